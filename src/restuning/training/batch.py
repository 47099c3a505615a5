"""A batch is `(inputs, labels)`: inputs a tensor, or a dict of tensors called by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from restuning._errors import TrainingError

# `ignore_index` of `F.cross_entropy` by default, so such a token's loss is zero unasked.
IGNORED = -100
"""Label of tokens that do not count."""


def compute_logits(model: nn.Module, inputs: Any) -> Tensor:
    """Logits in float32, `b c`, or `b n c` with a label for every token.

    Raises:
        TrainingError: The model gave something else.
    """
    logits = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    if not isinstance(logits, Tensor) or logits.ndim not in (2, 3):
        found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else str(type(logits))
        raise TrainingError(
            "a model must return logits of shape (batch, classes) or (batch, tokens, classes)",
            found=found,
            fix="give the task a head with one output per class",
        )
    # Autocast leaves a head's product in half precision; losses are summed in float32.
    return logits.float()


def score(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Sum over examples of the cross entropy, and of the right answers.

    An example of labelled tokens counts as one: the mean over its tokens.

    Raises:
        TrainingError: Logits and labels do not belong together.
    """
    if logits.ndim != labels.ndim + 1:
        raise TrainingError(
            "logits and labels do not belong together",
            found=f"logits {tuple(logits.shape)}, labels {tuple(labels.shape)}",
            fix='a label for every token wants a task with pool="all", one a text another pool',
        )
    if labels.ndim == 1:
        # Sums, not means: pieces and processes differ in size, and the loop divides once by the
        # batch.
        loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
        return loss, (logits.detach().argmax(1) == labels).sum()
    each = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="none", label_smoothing=smoothing
    ).view(labels.shape)
    counted = labels != IGNORED
    # A text may have no labelled token at all: zero over one, not zero over zero.
    number = counted.sum(1).clamp(min=1)
    right = ((logits.detach().argmax(-1) == labels) & counted).sum(1) / number
    return (each.sum(1) / number).sum(), right.sum()


def split_batch(inputs: Any, labels: Tensor, count: int) -> Iterator[tuple[Any, Tensor]]:
    """Split a batch into at most `count` pieces of nearly one size."""
    number = len(labels)
    count = min(count, number)
    for place in range(count):
        # Bounds rounded down differ by one at most; no piece is empty, as count is at most number.
        part = slice(number * place // count, number * (place + 1) // count)
        if isinstance(inputs, dict):
            yield {k: v[part] for k, v in inputs.items()}, labels[part]
        else:
            yield inputs[part], labels[part]


def move(inputs: Any, labels: Tensor, device: torch.device) -> tuple[Any, Tensor]:
    """Bring a piece to a device without waiting for it."""
    if isinstance(inputs, dict):
        inputs = {k: v.to(device, non_blocking=True) for k, v in inputs.items()}
    else:
        inputs = inputs.to(device, non_blocking=True)
    return inputs, labels.to(device, non_blocking=True)


def check_labels(lowest: int, highest: int, classes: int) -> None:
    """Refuse labels that no output stands for: on a GPU they would end the process.

    Raises:
        TrainingError: A label is outside the classes.
    """
    if lowest < 0 or highest >= classes:
        raise TrainingError(
            "a label is outside the task's classes",
            found=f"label {lowest if lowest < 0 else highest}, {classes} classes (0 to "
            f"{classes - 1})",
            fix="build the task with num_classes of this data set",
        )


def label_range(labels: Any) -> tuple[int, int]:
    """Lowest and highest label of a batch.

    Raises:
        TrainingError: Labels are not whole numbers.
    """
    if not isinstance(labels, Tensor) or labels.ndim not in (1, 2) or labels.is_floating_point():
        found = str(type(labels))
        if isinstance(labels, Tensor):
            found = f"{labels.dtype}, shape {tuple(labels.shape)}"
        raise TrainingError(
            "labels must be whole numbers, one an example or one a token",
            found=found,
            fix="let the data set yield (input, class index)",
        )
    # Ignored tokens are of no class; labels of nothing else have no range to be refused for.
    if labels.ndim == 2:
        labels = labels[labels != IGNORED]
        if not len(labels):
            return 0, 0
    return int(labels.min()), int(labels.max())
