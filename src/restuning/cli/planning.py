"""What training will take, before it is started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from restuning import forecast, methods
from restuning._errors import ForecastError, NoSitesError, PlacementError, ProjectionsError
from restuning.backbones import Backbone, load_backbone
from restuning.cli.common import headed, size_in_words, time_in_words
from restuning.features.stored import taps_to_store
from restuning.host import Host
from restuning.search.sweep import TOGETHER
from restuning.sites import IN_WORDS, Needs
from restuning.task import Task
from restuning.training.defaults import default_of
from restuning.training.timing import EVALUATED, measure_bank, read_seconds

COMPARED = ("linear", "res-tuning-bypass", "res-tuning", "full")


@dataclass(frozen=True)
class Request:
    """What is to be planned.

    Attributes:
        backbone: Its name.
        classes: Of the head.
        splits: Inputs by split; empty where the data are not known.
        batch: Inputs of a step.
        epochs: None for each method's default.
        budget: Bytes, or None.
        precision, dtype: Of autocast, of a store.
        options: Of the methods.
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


class Planner:
    """Forecasts for one backbone: its shapes, and one forward to compare with."""

    def __init__(self, loaded: Backbone, host: Host, request: Request) -> None:
        self.loaded, self.host, self.request = loaded, host, request
        self.drawn: Host | None = None
        self.example: Any = loaded.kwargs or loaded.example
        self.rates = forecast.measure_rates()
        self.forward = forecast.forecast_forward(
            host.model, self.example, request.batch, precision=request.precision
        )

    def options(self, method: str) -> list[forecast.Option]:
        """Every form of a method."""
        host, task = self.host, self._task(method, self.host)
        if host.lacks_projections(task.inline_tuners):
            # They are proved with weights only, and this host was opened without.
            self.drawn = self.drawn or forecast.load_drawn(self.request.backbone)[1]
            host, task = self.drawn, self._task(method, self.drawn)
        return [self._option(method, form, host, task) for form in forecast.forms(task)]

    def _task(self, method: str, host: Host) -> Task:
        return methods.build(method, host, num_classes=self.request.classes, **self.request.options)

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
            largest = forecast.largest_batch(at, request.budget, first=step)
        forward, own = self.forward.cost.seconds(self.rates), step.cost.seconds(self.rates)
        return forecast.Option(
            method,
            form,
            _words(needs),
            step,
            own / forward,
            self._seconds(method, form, own, forward),
            size or None,
            largest,
        )

    def _seconds(self, method: str, form: str, step: float, forward: float) -> float | None:
        splits, batch = self.request.splits, self.request.batch
        if not splits:
            return None
        default = default_of(method)
        epochs = self.request.epochs or default.epochs
        steps = -(-splits["train"] // batch)
        if form == "cached":
            # Evaluation from the store is a part of a step.
            return sum(splits.values()) / batch * forward + epochs * steps * step
        return epochs * (steps * step + splits.get("val", 0) / batch * forward)


def _words(needs: Needs) -> str:
    tokens = IN_WORDS[needs.tokens]
    return f"{len(needs.taps)} taps, {tokens}" if len(needs.taps) > 1 else f"last tap, {tokens}"


def run(
    request: Request, chosen: Sequence[str], loaded: Backbone, host: Host, console: Console
) -> dict[str, Any]:
    """Forecast methods side by side, print the table and recommend; returns all of it."""
    planner = Planner(loaded, host, request)
    options, left_out = [], {}
    for method in chosen:
        try:
            options += planner.options(method)
        except (NoSitesError, PlacementError, ProjectionsError) as error:
            if len(chosen) == 1:
                raise
            left_out[method] = error.what
    found = forecast.recommend(options, request.batch)
    _show(planner, options, found, console)
    for method, reason in left_out.items():
        console.print(f"{method}: {reason}")
    return {
        "backbone": request.backbone,
        "batch": request.batch,
        "splits": request.splits,
        "memory": request.budget,
        "rates": asdict(planner.rates),
        "forward": planner.forward.to_dict()
        | {"seconds": planner.forward.cost.seconds(planner.rates)},
        "options": [asdict(o) | {"step": o.step.to_dict()} for o in options],
        "recommended": None
        if found is None
        else {
            "method": found.option.method,
            "form": found.option.form,
            "reads": found.option.reads,
            "batch": found.batch,
            "why": found.why,
        },
        "left_out": left_out,
    }


def grid(
    request: Request,
    method: str,
    data: Any,
    *,
    arms: int,
    tasks: int,
    finals: int,
    console: Console,
) -> dict[str, Any]:
    """Time the backbone and a bank on this machine, and forecast a grid; returns it."""
    if not request.splits:
        raise ForecastError("a grid is of data", fix="give --data or --images")
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
    default = default_of(method)
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
    rates, single = measure(arms=min(arms, TOGETHER)), measure(arms=1)
    told = forecast.forecast_grid(
        rates,
        request.splits,
        tasks=tasks,
        arms=arms,
        epochs=request.epochs or default.epochs,
        batch=request.batch,
        finals=finals,
        single=single,
    )
    console.print()
    console.print(
        headed(
            "grid",
            f"{tasks} x {arms} runs of {method}, and {finals} of each choice: "
            f"{time_in_words(told.seconds)} (features {time_in_words(told.features)}, "
            f"search {time_in_words(told.search)}, final {time_in_words(told.final)})\n"
            f"  measured here: {rates.forward_seconds * 1e3:.1f} ms an image, "
            f"{rates.step_seconds * 1e3:.1f} ms a step of {rates.arms} arms",
        )
    )
    return told.to_dict() | {"measured": asdict(rates), "measured_single": asdict(single)}


def _show(
    planner: Planner,
    options: list[forecast.Option],
    found: forecast.Recommendation | None,
    console: Console,
) -> None:
    request, forward = planner.request, planner.forward
    table = Table(
        title=f"{request.backbone}, batch {request.batch}: weights "
        f"{size_in_words(forward.weights_bytes)}, one forward {size_in_words(forward.above_bytes)} above them and "
        f"about {time_in_words(forward.cost.seconds(planner.rates))}",
        title_justify="left",
    )
    columns = ["method", "form", "reads", "memory", "above weights", "step / forward"]
    columns += ["run", "store"] if request.splits else []
    columns += ["largest batch"] if request.budget is not None else []
    for column in columns:
        right = columns.index(column) > 2
        table.add_column(
            column,
            justify="right" if right else "left",
            overflow="fold",
            no_wrap=column in ("method", "form"),
        )
    for option in options:
        step = option.step
        cells = [
            option.method,
            option.form,
            option.reads,
            size_in_words(step.total_bytes),
            size_in_words(step.above_bytes),
            f"{option.time_over_forward:.2f}",
        ]
        if request.splits:
            cells += [time_in_words(option.seconds), size_in_words(option.store_bytes)]
        if request.budget is not None:
            cells.append(str(option.largest_batch or "none"))
        taken = found is not None and option is found.option
        table.add_row(*cells, style="bold" if taken else "")
    console.print(table)
    if found is None:
        console.print("nothing fits: a smaller backbone or more memory is needed")
    else:
        words = f"{found.option.method}, {found.option.form} ({found.option.reads})"
        console.print(headed("take", f"{words}, batch {found.batch}: {found.why}"))
