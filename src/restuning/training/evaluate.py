"""What a tuned model answers to a data set, and how often it is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from restuning._errors import TrainingError
from restuning.training.batch import (
    IGNORED,
    check_labels,
    compute_logits,
    label_range,
    move,
    score,
)


def evaluate(
    tuned: nn.Module,
    dataset: Any,
    batch_size: int = 64,
    collate: Callable | None = None,
    *,
    workers: int = 0,
    accelerator: Accelerator | None = None,
    between: Callable[[], None] | None = None,
    watch: Callable[[Tensor, Tensor], None] | None = None,
) -> dict[str, float]:
    """Accuracy, mean cross entropy (without label smoothing) and count, of examples or of tokens.

    The model is left in the mode it was in. Order and batch size do not matter.

    Args:
        tuned: A module with `.task` and `.host`.
        dataset: Map-style, yields `(input, label)`.
        batch_size: Per process.
        collate: Makes a batch of a list of examples.
        workers: Processes that load data.
        accelerator: Given by a run in several processes: each takes a share, all get the result.
        between: Called before every batch; may raise to stop.
        watch: Shown the logits (`n c`) and labels (`n`) of every batch.

    Raises:
        TrainingError: The data set is empty or a label is outside the classes.
    """
    if len(dataset) == 0:
        raise TrainingError("there is nothing to evaluate", found="an empty data set")
    world = accelerator.num_processes if accelerator else 1
    rank = accelerator.process_index if accelerator else 0
    # Shares of almost one size: a DistributedSampler would count some examples twice.
    share = range(len(dataset) * rank // world, len(dataset) * (rank + 1) // world)
    device = find_task_device(tuned)
    # Sums of batches meet in double precision: 50,000 losses in float32 lose digits.
    sums = torch.zeros(3, dtype=torch.float64 if device.type != "mps" else torch.float32)
    sums = sums.to(device)
    for logits, labels in iterate_logits(
        tuned, dataset, batch_size, collate, rows=share, workers=workers, between=between
    ):
        if watch is not None:
            watch(logits, labels)
        loss, hits = score(logits, labels)
        sums += torch.stack([loss, hits.to(loss.dtype), loss.new_tensor(len(labels))])
    if accelerator is not None and world > 1:
        total = accelerator.reduce(sums, "sum")
        assert isinstance(total, Tensor)
        sums = total
    loss, correct, count = sums.tolist()
    return {"accuracy": correct / count, "loss": loss / count, "count": int(count)}


def iterate_logits(
    tuned: nn.Module,
    dataset: Any,
    batch_size: int,
    collate: Callable | None = None,
    *,
    rows: range | None = None,
    workers: int = 0,
    between: Callable[[], None] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (`n c`, float32) and labels (`n`) batch by batch, on the task's device.

    In eval mode and without gradients; tokens without a label are left out. Modes are put back.

    Args:
        tuned: A module that gives logits.
        dataset: Map-style, yields `(input, label)`.
        batch_size: Inputs of one forward.
        collate: Makes a batch of a list of examples.
        rows: Which examples, in this order; None for all.
        workers: Processes that load data.
        between: Called before every batch; may raise to stop.

    Raises:
        TrainingError: A label is outside the classes.
    """
    rows = range(len(dataset)) if rows is None else rows
    device = find_task_device(tuned)
    loader = DataLoader(
        dataset,
        batch_sampler=[list(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)],
        collate_fn=collate,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        # Else the loader would draw from the caller's generator.
        generator=torch.Generator().manual_seed(0),
    )
    # Module by module: a caller may hold single ones in eval mode while the others train.
    training = {m: m.training for m in tuned.modules()}
    tuned.eval()
    try:
        for inputs, labels in loader:
            if between is not None:
                between()
            lowest, highest = label_range(labels)
            inputs, labels = move(inputs, labels, device)
            # Around the forward alone: it would else reach into the caller's loop between batches.
            with torch.no_grad():
                logits = compute_logits(tuned, inputs)
            check_labels(lowest, highest, logits.shape[-1])
            if labels.ndim == 2:
                counted = labels != IGNORED
                logits, labels = logits[counted], labels[counted]
            yield logits, labels
    finally:
        for module, mode in training.items():
            module.training = mode


def collect_logits(
    tuned: nn.Module, dataset: Any, batch_size: int, collate: Callable | None = None
) -> tuple[Tensor, Tensor]:
    """Logits (`n c`) and labels (`n`) of a whole data set, on the CPU; see `iterate_logits`."""
    logits: list[Tensor] = []
    labels: list[Tensor] = []
    for some, right in iterate_logits(tuned, dataset, batch_size, collate):
        # At once: the logits of a whole split may not fit beside the backbone.
        logits.append(some.cpu())
        labels.append(right.cpu())
    return torch.cat(logits), torch.cat(labels)


def find_task_device(tuned: nn.Module) -> torch.device:
    """Where the task is, as `host.find_device` says where a backbone is.

    The backbone may be on another device than the task, or kept elsewhere until it runs.
    """
    parameter = next(getattr(tuned, "task", tuned).parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The precision a run computes in."""
    kind = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, kind, enabled=precision != "no")
