"""`restuning plan`: what training will take, before it is started."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from restuning import forecast, methods
from restuning._errors import ForecastError, NoSitesError, PlacementError, ProjectionsError
from restuning.backbones import Backbone, load_backbone
from restuning.cli.frame import (
    BackboneName,
    Json,
    SkipBad,
    app,
    console,
    size_in_words,
    time_in_words,
)
from restuning.data import load_data
from restuning.features import DTYPES
from restuning.features.codec import check_dtype
from restuning.features.stored import taps_to_store
from restuning.host import Host
from restuning.search.sweep import TOGETHER
from restuning.sites import IN_WORDS, Needs
from restuning.task import Task
from restuning.training import FitSettings
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

    def _option(self, method: str, form: str, host: Host, task: Any) -> forecast.Option:
        request = self.request
        at = partial(
            forecast.forecast_task,
            host,
            task,
            self.example,
            cached=form == "cached",
            checkpointing=form == "checkpointing",
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
    request: Request, chosen: list[str], loaded: Backbone, host: Host, console: Console
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
        console.print(f"{method}: {reason}", highlight=False)
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
    console.print(
        f"\n[bold]grid[/bold]  {tasks} x {arms} runs of {method}, and {finals} of each choice: "
        f"{time_in_words(told.seconds)} (features {time_in_words(told.features)}, search {time_in_words(told.search)}, "
        f"final {time_in_words(told.final)})\n  measured here: {rates.forward_seconds * 1e3:.1f} ms an "
        f"image, {rates.step_seconds * 1e3:.1f} ms a step of {rates.arms} arms",
        highlight=False,
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
        console.print(
            f"[bold]take[/bold]  {words}, batch {found.batch}: {found.why}", highlight=False
        )


@app.command(
    epilog="[bold]Examples[/bold]\n\nrestuning plan --data digits\n\n"
    "restuning plan --backbone timm:vit_base_patch16_224 --images 1000 --memory 8GB\n\n"
    "restuning plan --backbone timm:vit_small_patch16_224 --method res-tuning --batch 32\n\n"
    "restuning plan --data digits --arms 15 --tasks 19"
)
def plan(
    backbone: BackboneName = "restuning-tiny",
    data: Annotated[str | None, typer.Option(help="As for train; its images are counted")] = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="Training images, instead of --data")
    ] = None,
    method: Annotated[str | None, typer.Option(help="One method; without it four")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images of a step")] = 64,
    memory: Annotated[str | None, typer.Option(help="Budget for everything, e.g. 8GB")] = None,
    classes: Annotated[int | None, typer.Option(min=1, help="Default: of the data, or 100")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Default: as train")] = None,
    rank: Annotated[int | None, typer.Option(help="Bottleneck or length of the tuners")] = None,
    precision: Annotated[str, typer.Option(help="no, bf16, fp16")] = "no",
    cache_dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "fp32",
    arms: Annotated[
        int | None, typer.Option(min=1, help="Runs of a grid (times this here)")
    ] = None,
    tasks: Annotated[int, typer.Option(min=1, help="Data sets of a grid")] = 1,
    finals: Annotated[int, typer.Option(min=0, help="Runs of a grid's choice")] = 3,
    skip_bad: SkipBad = False,
    text: str = "text",
    label: str = "label",
    as_json: Json = False,
) -> None:
    """What training takes and what to choose, from shapes alone; no weights, no training."""
    to = Console(stderr=True) if as_json else console
    budget = None if memory is None else forecast.parse_bytes(memory)
    if data is not None and images is not None:
        raise typer.BadParameter("give --data or --images, not both")
    FitSettings(precision=precision)
    torch.manual_seed(0)
    loaded, host = forecast.load_shapes(backbone)
    found, splits = None, {} if images is None else {"train": images}
    if data is not None:
        found = load_data(data, loaded, skip_bad=skip_bad, text=text, label=label)
        parts = {"train": found.train, "val": found.val, "test": found.test}
        splits = {name: len(part) for name, part in parts.items() if part is not None}
    request = Request(
        backbone,
        classes or (found.num_classes if found else 100),
        splits,
        batch,
        epochs,
        budget,
        precision,
        check_dtype(cache_dtype),
        {"rank": rank} if rank else {},
    )
    report = run(request, [method] if method else list(COMPARED), loaded, host, to)
    if arms is not None:
        report["grid"] = grid(
            request,
            method or "res-tuning-bypass",
            found,
            arms=arms,
            tasks=tasks,
            finals=finals,
            console=to,
        )
    if as_json:
        typer.echo(json.dumps(report, indent=1))
