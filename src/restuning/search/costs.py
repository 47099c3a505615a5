"""Memory and time of a candidate: counted from shapes, and measured in a few steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from restuning.data import Data
from restuning.forecast import (
    StepForecast,
    call_module,
    example_of,
    forecast_forward,
    forecast_step,
    largest_batch,
    split_inputs,
)
from restuning.host import Extractor
from restuning.search.budget import Budget
from restuning.search.candidates import Candidate
from restuning.task import prepare_example
from restuning.training import FitSettings
from restuning.training.timing import measure_step

TIMED = 8
"""Inputs of the timed forward."""


class Costs:
    """Memory and time that candidates take on one backbone and data set.

    Args:
        host: The backbone.
        data: The inputs, with a training and a validation split.
        tested: Inputs of the test split.
        settings: Settings of a run inside the backbone.
    """

    def __init__(self, host: Extractor, data: Data, tested: int, settings: FitSettings) -> None:
        self.host, self.data, self.tested, self.settings = host, data, tested, settings
        self.inputs = len(data.train) + len(data.val)
        self.device = host.device.type
        # In a tuple, because None is an answer as well: it cannot be known.
        self._forward: tuple[StepForecast | None] | None = None
        self._seconds: float | None = None

    def example(self, fed: Data, task: Any = None) -> Any:
        """One input, batch 1, with what the task's side network has prepared beside it, if there is a task."""
        example = example_of(fed.train, fed.collate, self.settings.batch_size)
        return prepare_example(task, example)

    def forward(self) -> StepForecast | None:
        """Forecast of a forward without gradients, which every method ends with; None if not known."""
        if self._forward is None:
            self._forward = (
                _forecast_if_possible(
                    lambda: forecast_forward(
                        self.host,
                        self.example(self.data),
                        self.settings.batch_size,
                        device=self.device,
                        precision=self.settings.precision,
                    )
                ),
            )
        return self._forward[0]

    def step(
        self, tuned: nn.Module, fed: Data, settings: FitSettings, budget: Budget, split: bool
    ) -> tuple[StepForecast | None, int]:
        """Forecast a training step and the pieces its batch is run in; None if it cannot be known.

        Args:
            tuned: With `.task`.
            fed: The splits as it trains on them.
            settings: Settings of its trial.
            budget: That a step should fit.
            split: More pieces may be made: the step is the same (as `restuning plan` proposes).
        """
        task: Any = tuned.task
        size = min(settings.batch_size, len(fed.train))
        at = partial(
            forecast_step,
            tuned.train(),
            self.example(fed, task),
            device=self.device,
            trained=[p for p in task.parameters() if p.requires_grad],
            precision=settings.precision,
        )
        pieces = min(settings.accumulate, size)
        step = _forecast_if_possible(lambda: at(size, pieces=pieces))
        if step is None or budget.memory is None or step.total_bytes <= budget.memory or not split:
            return step, pieces
        # `first` spares a forecast where the whole batch is what was just counted.
        most = largest_batch(at, budget.memory, first=step if pieces == 1 else None)
        if not most:
            # Nothing fits. The smallest step there is says how much is missing.
            return at(1), size
        return at(size, pieces=-(-size // most)), -(-size // most)

    def forward_seconds(self) -> float:
        """Seconds of the backbone on one input, from a forward of eight."""
        if self._seconds is None:

            def wide(value: Any) -> Any:
                if not isinstance(value, Tensor):
                    return value
                return value.expand(TIMED, *value.shape[1:]).to(self.host.device)

            args, kwargs = split_inputs(self.example(self.data))
            inputs: Any = {k: wide(v) for k, v in kwargs.items()} or tuple(map(wide, args))
            taps = partial(call_module, _Taps(self.host), inputs)
            _time_call(taps)
            self._seconds = _time_call(taps) / TIMED
        return self._seconds

    def features_seconds(self) -> float:
        """Seconds to store features of the training and the validation split."""
        return self.inputs * self.forward_seconds()

    def run_seconds(
        self,
        tuned: nn.Module,
        fed: Data,
        settings: FitSettings,
        candidate: Candidate,
        detached: bool,
    ) -> tuple[float, float]:
        """Seconds of a candidate's trial, and of its final run with its test, from measured steps."""
        step, forward = (
            measure_step(tuned, fed.train, settings, fed.collate),
            self.forward_seconds(),
        )
        batch, val = settings.batch_size, len(self.data.val)
        trial = -(-len(self.data.train) // batch) * settings.epochs * len(candidate.rates) * step
        # A final run reads train and val together; the choice it follows from needed them apart.
        final = -(-self.inputs // batch) * candidate.epochs(self.settings.epochs) * step
        final += self.tested * forward
        if detached:
            # Its features of both splits are those of the trial.
            return trial, final
        # Inside the backbone every epoch's validation runs the backbone as well; from a store it is
        # nothing beside the steps.
        return trial + settings.epochs * val * forward, final


class _Taps(nn.Module):
    """All taps of an input: what storing features costs."""

    def __init__(self, host: Extractor) -> None:
        super().__init__()
        self.host = host

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.host.features(*args, **kwargs)


def _time_call(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _forecast_if_possible(forecast: Callable[[], StepForecast]) -> StepForecast | None:
    """A forecast, or None for what cannot be followed by shapes, such as an engine."""
    try:
        return forecast()
    except Exception:  # noqa: BLE001 (any network may do so)
        return None
