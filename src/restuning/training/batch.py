"""A batch is `(inputs, labels)`: inputs a tensor, or a dict of tensors called by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from restuning._errors import TrainingError
from restuning.problems import IGNORED


def compute_logits(model: Callable[..., Any], inputs: Any) -> Tensor:
    """Logits in float32, `b c`; `b n c` with a label for every token, `b h w c` with one for every place.

    Raises:
        TrainingError: The model gave something else.
    """
    logits = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    if not isinstance(logits, Tensor) or logits.ndim not in (2, 3, 4):
        found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else str(type(logits))
        raise TrainingError(
            "a model must return logits of shape (batch, classes), (batch, tokens, classes) or (batch, height, "
            "width, classes)",
            found=found,
            fix="give the task a head with one output per class",
        )
    # Autocast leaves a head's product in half precision; losses are summed in float32.
    return logits.float()


def keep_labelled(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of labelled tokens those that have a label, `m c` and `m`; of all else everything, as it is."""
    if logits.ndim != 3:
        return logits, labels
    counted = labels != IGNORED
    return logits[counted], labels[counted]


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
