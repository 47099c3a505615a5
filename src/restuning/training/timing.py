"""Short measurements on this machine, from which the time of whole runs is forecast."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from restuning.features import StoredFeatures
from restuning.forecast.grid import BankRates
from restuning.host import Extractor
from restuning.problems import find_problem
from restuning.runtime.randomness import preserve_randomness
from restuning.task import Task
from restuning.training import FitSettings
from restuning.training.batch import compute_logits, move, split_batch
from restuning.training.evaluate import autocast, find_task_device
from restuning.training.parallel_runs import train_in_parallel
from restuning.training.prepare import with_stand_ins
from restuning.training.randomness import Order, batches

SHORT, LONG, ROUNDS = 4, 20, 3
"""Steps of the two timed runs, and how often both are made. Their difference is free of what a run does
once; of all differences, and of the forwards timed in between, the median counts."""

EVALUATED = 512
"""Inputs of the timed evaluation."""

IMAGES = 32
"""Images of the timed forward, which keeps features as extraction does."""

READ = 16
"""Samples whose reading is timed."""


def read_seconds(dataset: Any) -> float:
    """Seconds to read and decode one sample, from a few spread over the data set."""
    count = min(READ, len(dataset))
    start = time.perf_counter()
    for number in range(count):
        dataset[number * len(dataset) // count]
    return (time.perf_counter() - start) / count


class _RandomFeatures:
    """Features of a task's form with random values, as `StoredFeatures` gives them."""

    views, whole_batches = 1, True

    def __init__(self, shapes: dict[str, Tensor], count: int, classes: int) -> None:
        width = sum(tap[0].numel() for tap in shapes.values())
        # One row for all taps, as a store keeps it, so that a gather copies as much.
        self.rows = torch.randn(min(count, EVALUATED), width)
        self.shapes, self.count, self.classes = shapes, count, classes

    def __len__(self) -> int:
        return self.count

    def gather(self, indices: Sequence[int], views: Sequence[int]) -> tuple[Any, Tensor]:
        places = torch.tensor(indices) % len(self.rows)
        rows, taps, at = self.rows[places], {}, 0
        for name, tap in self.shapes.items():
            size = tap[0].numel()
            taps[name] = rows[:, at : at + size].unflatten(1, tap.shape[1:])
            at += size
        return taps, places % self.classes


def measure_bank(
    host: Extractor,
    build: Callable[[], Task],
    example: Any,
    *,
    arms: int,
    batch: int,
    classes: int,
    read: float = 0.0,
    evaluated: int = EVALUATED,
) -> BankRates:
    """Time the backbone on a few images, and parallel runs on features of the same form.

    Args:
        host: The frozen backbone, with weights.
        build: Makes the task of one run.
        example: One input, batch 1, positional (a tuple) or by keyword (a mapping).
        arms: Runs that are made in parallel.
        batch: Examples of a step.
        classes: Outputs of the head.
        read: Seconds for reading and decoding one image, added to its forward.
        evaluated: Inputs of the timed evaluation: as many as there will be, as a small one costs
            more an input.

    Cost: four forwards of `IMAGES`, and some 140 steps of the bank.
    """
    positional, keyword = ((), dict(example)) if isinstance(example, dict) else (example, {})
    needs = build().needs(host.readout_rule)
    taps = tuple(host.sites.taps[-1] if t == "last" else t for t in needs.taps)
    device = host.device

    def wide(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.expand(IMAGES, *value.shape[1:]).to(device)

    def features() -> dict[str, Tensor]:
        return host.features(
            *map(wide, positional),
            keep=type(needs)(taps, needs.tokens),
            **{k: wide(v) for k, v in keyword.items()},
        )

    shapes = {name: tap[:1] for name, tap in features().items()}

    def time_runs(epochs: int, val: int) -> float:
        # One step an epoch, so that evaluations are as many as steps.
        settings = [FitSettings(epochs=epochs, batch_size=batch, seed=0)] * arms
        train, val_rows = (_RandomFeatures(shapes, n, classes) for n in (batch, max(1, val)))
        tasks = [build() for _ in range(arms)]
        return _time_call(
            lambda: train_in_parallel(
                host,
                tasks,
                settings,
                cast(StoredFeatures, train),
                cast(StoredFeatures, val_rows) if val else None,
            )
        )

    # Not counted: the first run chooses kernels and allocates.
    time_runs(2, evaluated)
    forwards, steps, evaluations = [], [], []
    for _ in range(ROUNDS):
        forwards.append(_time_call(features) / IMAGES)
        short, long, with_val = (
            time_runs(SHORT, 0),
            time_runs(LONG, 0),
            time_runs(LONG, evaluated),
        )
        steps.append((long - short) / (LONG - SHORT))
        evaluations.append((with_val - long) / LONG / evaluated)
    step, evaluation = (max(0.0, statistics.median(t)) for t in (steps, evaluations))
    return BankRates(statistics.median(forwards) + read, step, evaluation, arms)


def measure_step(tuned: nn.Module, train: Any, settings: FitSettings, collate: Any = None) -> float:
    """Seconds of a training step on real examples: the faster of two, after one that sets up.

    Args:
        tuned: With `.task`; its weights are left as they are.
        train: Data set of `(input, label)`.
        settings: Batch, pieces and precision.
        collate: Makes a batch of a list of examples.

    Cost: three forwards and backwards.
    """
    device = find_task_device(tuned)
    order = Order(len(train), settings.batch_size, 3, settings.seed)
    # Nothing is prepared for a measurement: a step on zeros takes as long.
    train, collate = with_stand_ins(tuned, train, collate)
    loader = iter(batches(train, order, 0, 0, 1, collate, 0, pin=False))
    seconds = []
    tuned.train()
    with preserve_randomness():
        for _ in range(3):
            start = time.perf_counter()
            batch, answers = next(loader)
            for inputs, labels in split_batch(batch, answers, settings.accumulate):
                inputs, labels = move(inputs, labels, device)
                with autocast(device, settings.precision):
                    logits = compute_logits(tuned, inputs)
                loss = find_problem(getattr(tuned, "task", None)).loss(logits, labels)
                loss.backward()
                # Waits for a device that computes in its own time.
                loss.detach().item()
            seconds.append(time.perf_counter() - start)
    tuned.zero_grad(set_to_none=True)
    tuned.eval()
    return min(seconds[1:])


def _time_call(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
