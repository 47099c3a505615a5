"""The forecast of a run that was made, to stand beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from restuning.data.data import CACHED_PIXELS
from restuning.features import StoredFeatures
from restuning.features.store import IN_MEMORY
from restuning.forecast.rates import Rates, measure_rates
from restuning.forecast.step import forecast_step
from restuning.task import prepare_example

machine_rates = cache(measure_rates)
"""Of this machine, measured once a process."""


@dataclass(frozen=True)
class FinishedRun:
    """What a run was, as far as its cost goes.

    Attributes:
        module: `Tuned` or `Cached`, after the run.
        train, val: The data it was fed.
        collate: Samples to a batch; None for torch's default.
        batch, pieces, epochs, precision: Of its settings.
        ema: Whether a running mean of the weights was kept.
    """

    module: nn.Module
    train: Any
    val: Any
    collate: Any
    batch: int
    pieces: int
    epochs: int
    precision: str
    ema: bool


def forecast_run(run: FinishedRun) -> dict[str, Any]:
    """Memory above the start of a run, and its time, as shapes alone foretell them.

    The measured peak counts from where `fit` starts, when weights are there already. It holds the
    step's own peak, AdamW's moments, the batch, and data that are kept in memory once read.

    Returns:
        `peak_memory_bytes` and its parts, `seconds`, `step_seconds`; or `not_made` with the reason.
        Never raises: a run that is over must not fail for a forecast.

    Cost: one to two seconds at most, no memory.
    """
    # A forecast is a remark beside a result that is there already.
    try:
        return _forecast(run)
    except Exception as error:  # noqa: BLE001 (any network may do what shapes cannot follow)
        words = (str(error).strip().splitlines() or [""])[0]
        return {"not_made": f"{type(error).__name__}: {words[:200]}"}


def _forecast(run: FinishedRun) -> dict[str, Any]:
    size = min(run.batch, len(run.train))
    task: Any = run.module.task
    plain = example_of(run.train, run.collate, size)
    example = prepare_example(task, plain)
    device = next(task.parameters()).device.type
    trained = [p for p in task.parameters() if p.requires_grad]
    more: dict[str, Any] = {"precision": run.precision, "device": device}
    step = forecast_step(
        run.module, example, size, trained=trained, pieces=min(run.pieces, size), **more
    )
    forward = forecast_step(
        run.module, example, size, trained=(), loss=lambda logits: logits.sum(), **more
    )
    kept = _bytes_in_memory(run.train, plain) + (
        _bytes_in_memory(run.val, plain) if run.val is not None else 0
    )
    ema = step.trained_bytes if run.ema else 0
    rates: Rates = machine_rates(device)
    steps, evaluated = -(-len(run.train) // run.batch), len(run.val) if run.val is not None else 0
    step_seconds = step.cost.seconds(rates)
    seconds = steps * step_seconds + evaluated / size * forward.cost.seconds(rates)
    return {
        "peak_memory_bytes": step.above_bytes
        + step.optimiser_bytes
        + step.input_bytes
        + kept
        + ema,
        "step_peak_bytes": step.above_bytes,
        "saved_bytes": step.saved_bytes,
        "optimiser_bytes": step.optimiser_bytes,
        "batch_bytes": step.input_bytes,
        "data_bytes": kept,
        "weights_bytes": step.weights_bytes,
        "flops_of_a_step": step.cost.flops,
        "step_seconds": step_seconds,
        "seconds": run.epochs * seconds,
    }


def example_of(train: Any, collate: Any, size: int) -> Any:
    """One input as a module takes it, with a batch axis of 1.

    Args:
        train: Data set of `(input, label)`.
        collate: Samples to a batch; None for torch's default.
        size: Of a batch: texts are as long as the longest of so many.
    """
    if collate is None or isinstance(train, StoredFeatures) or getattr(train, "whole_batches", 0):
        inputs = train[0][0]
        if isinstance(inputs, Mapping):
            return {k: v.unsqueeze(0) for k, v in inputs.items()}
        return torch.as_tensor(inputs).unsqueeze(0)
    # Texts of a batch are as long as its longest.
    inputs = collate([train[i] for i in range(min(size, len(train)))])[0]
    if isinstance(inputs, Mapping):
        return {k: v[:1] for k, v in inputs.items()}
    return inputs[:1]


def _bytes_in_memory(dataset: Any, example: Any) -> int:
    """Bytes of samples that a data set holds once they were read."""
    tensors = example.values() if isinstance(example, Mapping) else [example]
    one = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
    if isinstance(dataset, StoredFeatures):
        if not dataset.store.holds_splits:
            # Of the training split a part at a time, of the others nothing.
            return min(len(dataset), dataset.at_once or 0) * dataset.bytes_per_input
        # All splits and views that are drawn from, each as a whole.
        row = dataset.store.values_per_row * 4
        held = [len(dataset.store.labels(s)) * row for s in dataset.splits]
        return sum(
            size * (dataset.views if split == "train" else 1)
            for split, size in zip(dataset.splits, held, strict=True)
            if size <= IN_MEMORY
        )
    if getattr(dataset, "in_memory", None) is None:
        return 0
    values = max(1, one // 4)
    return min(len(dataset), CACHED_PIXELS // values) * one
