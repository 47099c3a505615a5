"""Forecasts of memory and time, method beside method, before training: all that `restuning plan` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from restuning import forecast, methods
from restuning._errors import ForecastError, NoSitesError, PlacementError, ProjectionsError
from restuning.backbones import Backbone, Preprocessing, load_backbone
from restuning.features.stored import taps_to_store
from restuning.host import Host
from restuning.search.sweep import TOGETHER
from restuning.sites import IN_WORDS, Needs, count_taps, is_stream
from restuning.task import Task
from restuning.training.defaults import find_default
from restuning.training.own_size import note_smaller_size
from restuning.training.timing import EVALUATED, measure_bank, read_seconds

USUAL_METHODS = ("linear", "res-tuning-bypass", "res-tuning", "full")
"""What is forecast where no method is named."""


@dataclass(frozen=True)
class ForecastRequest:
    """The backbone, data and settings that forecasts are made for.

    Attributes:
        backbone: Name of the backbone.
        classes: Outputs of the head.
        splits: Inputs by split; empty where the data are not known.
        batch: Inputs of a step.
        epochs: None for each method's default.
        budget: Bytes, or None.
        precision: Precision of autocast.
        dtype: Type of the values in a store.
        options: Options of every method.
    """

    backbone: str
    classes: int
    splits: dict[str, int]
    batch: int
    epochs: int | None
    budget: int | None
    precision: str
    dtype: str
    options: dict[str, Any]


class Forecaster:
    """Forecasts for one backbone: its shapes, and one forward to compare with."""

    def __init__(self, loaded: Backbone, host: Host, request: ForecastRequest) -> None:
        self.loaded, self.host, self.request = loaded, host, request
        self.host_with_weights: Host | None = None
        self.example: Any = loaded.kwargs or loaded.example
        self.rates = forecast.measure_rates()
        self.forward = forecast.forecast_forward(
            host.model, self.example, request.batch, precision=request.precision
        )

    def options(self, method: str) -> list[forecast.Option]:
        """A forecast for every form of a method."""
        host, task = self.host, self._task(method, self.host)
        if host.lacks_projections(task.inline_tuners):
            # They are proved with weights only, and this host was opened without.
            self.host_with_weights = (
                self.host_with_weights or forecast.load_drawn(self.request.backbone)[1]
            )
            host, task = self.host_with_weights, self._task(method, self.host_with_weights)
        return [self._option(method, form, host, task) for form in forecast.forms(task)]

    def _task(self, method: str, host: Host) -> Task:
        options = methods.keep_used(method, self.request.options)
        return methods.build(method, host, num_classes=self.request.classes, **options)

    def _option(self, method: str, form: forecast.Form, host: Host, task: Any) -> forecast.Option:
        request = self.request
        at = partial(
            forecast.forecast_task,
            host,
            task,
            self.example,
            form=form,
            precision=request.precision,
        )
        step, needs, size = at(request.batch), task.needs(host.readout_rule), None
        if form == "cached":
            taps = forecast.tap_shapes(host, taps_to_store(host, needs), self.example)
            size = forecast.store_bytes(taps, sum(request.splits.values()), request.dtype)
        largest = None
        if request.budget is not None:
            # `first` spares it a forecast: this batch has just been counted.
            largest = forecast.largest_batch(at, request.budget, first=step)
        forward, own = self.forward.cost.seconds(self.rates), step.cost.seconds(self.rates)
        return forecast.Option(
            method,
            form,
            _describe_needs(needs),
            step,
            own / forward,
            self._seconds(method, form, own, forward),
            # Nothing is stored where the form is live or the inputs are not counted.
            size or None,
            largest,
        )

    def _seconds(self, method: str, form: str, step: float, forward: float) -> float | None:
        splits, batch = self.request.splits, self.request.batch
        if not splits:
            return None
        default = find_default(method)
        epochs = default.epochs if self.request.epochs is None else self.request.epochs
        steps = -(-splits["train"] // batch)
        if methods.is_solved(method):
            # One pass; the solution itself takes seconds to minutes, by rows and features.
            return sum(splits.values()) / batch * forward
        if form == "cached":
            # Evaluation from the store is a part of a step.
            return sum(splits.values()) / batch * forward + epochs * steps * step
        # Live, each epoch's validation is one more pass of the backbone.
        return epochs * (steps * step + splits.get("val", 0) / batch * forward)


def _describe_needs(needs: Needs) -> str:
    tokens, names = IN_WORDS[needs.tokens], needs.taps
    if not any(map(is_stream, names)):
        return "the frozen feature" if len(names) == 1 else count_taps(names)
    return f"{count_taps(names)}, {tokens}" if len(names) > 1 else f"last tap, {tokens}"


@dataclass(frozen=True)
class MethodForecasts:
    """Forecasts of several methods on one backbone, and which of them to take.

    Attributes:
        request: What was asked for.
        rates: Measured speed of this machine.
        forward: One forward of the bare backbone.
        options: One for every method and form.
        recommended: The one to take; None where nothing fits.
        left_out: Methods the backbone has no place for, and why.
        image_size: Height and width in pixels that it is for; None of texts.
        own_size: Those that the backbone's weights are for; None where nothing says it.
        note: What a size below it costs some of the methods; "" where there is nothing to say.
    """

    request: ForecastRequest
    rates: forecast.Rates
    forward: forecast.StepForecast
    options: list[forecast.Option]
    recommended: forecast.Recommendation | None
    left_out: dict[str, str] = field(default_factory=dict)
    image_size: tuple[int, int] | None = None
    own_size: tuple[int, int] | None = None
    note: str = ""

    @property
    def forward_seconds(self) -> float:
        """Seconds of one forward of the bare backbone."""
        return self.forward.cost.seconds(self.rates)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they are written to JSON."""
        recommended = self.recommended
        return {
            "backbone": self.request.backbone,
            "batch": self.request.batch,
            "splits": self.request.splits,
            "memory": self.request.budget,
            "rates": asdict(self.rates),
            "forward": self.forward.to_dict() | {"seconds": self.forward_seconds},
            "options": [asdict(o) | {"step": o.step.to_dict()} for o in self.options],
            "recommended": None
            if recommended is None
            else {
                "method": recommended.option.method,
                "form": recommended.option.form,
                "reads": recommended.option.reads,
                "batch": recommended.batch,
                "why": recommended.why,
            },
            "left_out": self.left_out,
            "image_size": self.image_size,
            "own_size": self.own_size,
            "note": self.note,
        }


def forecast_methods(
    request: ForecastRequest, names: Sequence[str], loaded: Backbone, host: Host
) -> MethodForecasts:
    """Forecast methods side by side and recommend one.

    Args:
        request: What is asked for.
        names: Names of the methods.
        loaded, host: What `forecast.load_shapes` gives for the backbone.

    Raises:
        NoSitesError: The one method that is named has no place in the backbone.
        UnknownNameError: None of them has a use for an option.
    """
    for name in names:
        methods.check(name, options=request.options)
    methods.refuse_unused(names, request.options)
    forecaster = Forecaster(loaded, host, request)
    options, left_out = [], {}
    for method in names:
        try:
            options += forecaster.options(method)
        except (NoSitesError, PlacementError, ProjectionsError) as error:
            # The one that was asked for is an error; among several it is a line that says why.
            if len(names) == 1:
                raise
            left_out[method] = error.what
    recommended = forecast.recommend(options, request.batch)
    prepared, detached = loaded.preprocessing, not all(map(methods.runs_inside, names))
    return MethodForecasts(
        request,
        forecaster.rates,
        forecaster.forward,
        options,
        recommended,
        left_out,
        prepared.size if isinstance(prepared, Preprocessing) else None,
        loaded.own_size,
        note_smaller_size(loaded, detached=detached),
    )


@dataclass(frozen=True)
class TimedGrid:
    """The forecast of a grid of runs, and what it was worked out from.

    Attributes:
        method: That is trained.
        counts: Numbers of tasks, of settings tried for each, and of final runs for each choice.
        times: The forecast.
        measured: Rates of this machine for a bank of runs that are trained in parallel.
        measured_single: The same for one run alone.
    """

    method: str
    counts: tuple[int, int, int]
    times: forecast.GridForecast
    measured: forecast.BankRates
    measured_single: forecast.BankRates

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they are written to JSON."""
        return self.times.to_dict() | {
            "measured": asdict(self.measured),
            "measured_single": asdict(self.measured_single),
        }


def time_grid(
    request: ForecastRequest,
    method: str,
    data: Any,
    *,
    arms: int,
    tasks: int,
    finals: int,
) -> TimedGrid:
    """Time the backbone and a bank on this machine, and forecast a grid.

    Args:
        request: What is asked for; its data are known.
        method: A bypass method, or linear.
        data: The data set, whose reading is timed as well; None for none.
        arms: Settings of each task.
        tasks: Data sets.
        finals: Runs of each choice.

    Raises:
        ForecastError: Nothing says how many inputs there are, or the method is not trained from
            stored features.
    """
    if not request.splits:
        raise ForecastError("a grid is of data", fix="give --data or --images")
    # Random weights take as long as trained ones and need not be fetched.
    loaded = load_backbone(request.backbone, random=True)
    host = loaded.host()

    def build() -> Any:
        return methods.build(method, host, num_classes=request.classes, **request.options)

    if not forecast.storable(build()):
        raise ForecastError(
            "a grid is trained from stored features",
            where=method,
            found="tuners inside the backbone",
            fix="give --method res-tuning-bypass or linear",
        )
    default = find_default(method)
    measure = partial(
        measure_bank,
        host,
        build,
        loaded.kwargs or loaded.example,
        batch=request.batch,
        classes=request.classes,
        read=read_seconds(data.train) if data is not None else 0.0,
        evaluated=min(EVALUATED, request.splits.get("val", EVALUATED)),
    )
    # A sweep stacks no more at once; final runs are few, so they are timed as one alone.
    rates, single = measure(arms=min(arms, TOGETHER)), measure(arms=1)
    times = forecast.forecast_grid(
        rates,
        request.splits,
        tasks=tasks,
        arms=arms,
        epochs=default.epochs if request.epochs is None else request.epochs,
        batch=request.batch,
        finals=finals,
        single=single,
    )
    return TimedGrid(method, (tasks, arms, finals), times, rates, single)
