"""What a tuned model answers to a data set, and how often it is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from restuning._errors import TrainingError
from restuning.data.loader import Loader
from restuning.host import is_shared_out
from restuning.problems import find_problem
from restuning.problems.problem import read_meter
from restuning.training.batch import compute_logits, keep_labelled, move


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
) -> dict[str, Any]:
    """The metric of the task's problem, its mean loss (without label smoothing) and count, of examples or of tokens.

    Of classes these are `accuracy` (and cross entropy); of others the metric has its own name, and is None
    where it is not defined. The model is left in the mode it was in. Order and batch size do not matter.

    Args:
        tuned: A module with `.task` and `.host`.
        dataset: Map-style, yields `(input, label)`.
        batch_size: Per process.
        collate: Makes a batch of a list of examples.
        workers: Processes that load data.
        accelerator: Given by a run in several processes: each takes a share, all get the result. Where the
            backbone is shared out among them, each takes all.
        between: Called before every batch; may raise to stop.
        watch: Shown the logits (`n c`) and labels (`n`, or `n c`) of every batch.

    Raises:
        TrainingError: The data set is empty, or targets are none of the problem: a label outside the
            classes, NaN.
    """
    if len(dataset) == 0:
        raise TrainingError("there is nothing to evaluate", found="an empty data set")
    world = accelerator.num_processes if accelerator else 1
    rank = accelerator.process_index if accelerator else 0
    problem, meter = find_problem(getattr(tuned, "task", None)), None
    if not problem.counted and len(dataset) < world:
        # A process without a row would have no meter to meet the others with, and they would wait for it
        # without end: so few rows each reads all of.
        world, rank = 1, 0
    if needs_all_processes(tuned):
        # Its processes make the same forwards: with shares of their own one would have a batch more.
        world, rank = 1, 0
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
        loss, hits = problem.score(logits, labels)
        if not problem.counted:
            if meter is None:
                meter = problem.metrics(logits.shape[-1])[problem.metric].to(device)
            meter.update(logits, labels)
        sums += torch.stack([loss, hits.to(loss.dtype), loss.new_tensor(len(labels))])
    if accelerator is not None and world > 1:
        total = accelerator.reduce(sums, "sum")
        assert isinstance(total, Tensor)
        sums = total
        if meter is not None:
            meter.sync(distributed_available=lambda: True)
    loss, correct, count = sums.tolist()
    figure = correct / count if problem.counted else read_meter(meter)
    return {problem.metric: figure, "loss": loss / count, "count": int(count)}


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
    """Logits (`n c`, float32) and labels (`n`, or `n c` of several) batch by batch, on the task's device.

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
        TrainingError: Targets are none of the task's problem.
    """
    rows = range(len(dataset)) if rows is None else rows
    problem = find_problem(getattr(tuned, "task", None))
    device = find_task_device(tuned)
    loader = Loader(
        dataset,
        collate,
        batch_sampler=[list(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)],
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
            problem.check_targets(labels)
            given, (inputs, labels) = labels, move(inputs, labels, device)
            # Around the forward alone: it would else reach into the caller's loop between batches.
            with torch.no_grad():
                logits = compute_logits(tuned, inputs)
            problem.check_targets(given, logits.shape[-1])
            yield keep_labelled(logits, labels)
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


def needs_all_processes(tuned: nn.Module) -> bool:
    """Whether the backbone of a tuned module is shared out among processes (FSDP2, tensor parallelism)."""
    backbone = getattr(getattr(tuned, "host", None), "model", None)
    return isinstance(backbone, nn.Module) and is_shared_out(backbone)


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
