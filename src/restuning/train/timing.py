"""Times that a forecast of a whole grid starts from, measured once on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from restuning.features import StoredFeatures
from restuning.forecast import BankRates
from restuning.host import Host
from restuning.task import Task
from restuning.train.arms import train_arms
from restuning.train.settings import FitSettings

SHORT, LONG, ROUNDS = 4, 12, 3
"""Steps of two timed runs, whose difference is free of what is done once, and how often: the median
counts."""

EVALUATED = 512
"""Inputs of the timed evaluation."""


READ = 16
"""Samples whose reading is timed."""


def read_seconds(dataset: Any) -> float:
    """Seconds to read and decode one sample, from a few spread over the data set."""
    count = min(READ, len(dataset))
    start = time.perf_counter()
    for number in range(count):
        dataset[number * len(dataset) // count]
    return (time.perf_counter() - start) / count


class _Drawn:
    """Features of a task's form with random values, as `StoredFeatures` gives them."""

    views = 1

    def __init__(self, shapes: dict[str, Tensor], count: int, classes: int) -> None:
        width = sum(tap[0].numel() for tap in shapes.values())
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
    host: Host, build: Callable[[], Task], example: Any, *, arms: int, batch: int, classes: int,
    images: int = 32, read: float = 0.0, evaluated: int = EVALUATED,
) -> BankRates:  # fmt: skip
    """Time the backbone on a few images, and a bank of arms on features of the same form.

    Args:
        host: The frozen backbone, with weights.
        build: Makes the task of one arm.
        example: One input, batch 1, positional (a tuple) or by keyword (a mapping).
        arms: Trained at once.
        batch: Of a step.
        classes: Of the head.
        images: Of the timed forward, as features are extracted.
        read: Seconds for reading and decoding one image, added to its forward.

        evaluated: Inputs of the timed evaluation: as many as there will be, as a small one costs
            more an input.

    Cost: three forwards of `images`, and 64 steps of the bank.
    """
    positional, keyword = ((), dict(example)) if isinstance(example, dict) else (example, {})
    needs = build().needs(host.readout_rule)
    taps = tuple(host.sites.taps[-1] if t == "last" else t for t in needs.taps)
    device = next(host.model.parameters()).device

    def wide(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.expand(images, *value.shape[1:]).to(device)

    seconds: list[float] = []
    features: dict[str, Tensor] = {}
    for _ in range(3):
        start = time.perf_counter()
        features = host.features(
            *map(wide, positional), keep=type(needs)(taps, needs.tokens),
            **{k: wide(v) for k, v in keyword.items()},
        )  # fmt: skip
        seconds.append(time.perf_counter() - start)
    forward = min(seconds) / images
    shapes = {name: tap[:1] for name, tap in features.items()}

    def run(steps: int, evaluated: int) -> float:
        settings = [FitSettings(epochs=1, batch_size=batch, seed=0)] * arms
        data = [
            cast(StoredFeatures, _Drawn(shapes, n, classes)) if n else None
            for n in (steps * batch, evaluated)
        ]
        assert data[0] is not None
        tasks = [build() for _ in range(arms)]
        start = time.perf_counter()
        train_arms(host, tasks, settings, data[0], data[1])
        return time.perf_counter() - start

    run(2, evaluated)
    steps, evaluations = [], []
    for _ in range(ROUNDS):
        short, long, with_val = run(SHORT, 0), run(LONG, 0), run(SHORT, evaluated)
        steps.append((long - short) / (LONG - SHORT))
        evaluations.append((with_val - short) / evaluated)
    return BankRates(
        forward + read, max(0.0, statistics.median(steps)),
        max(0.0, statistics.median(evaluations)), arms,
    )  # fmt: skip
