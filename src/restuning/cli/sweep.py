"""`restuning sweep`: a grid of settings from features computed once, chosen on val."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from restuning.cli.common import (
    FEATURES,
    METHOD,
    ON_RAY,
    OPTIMISER,
    OUTPUT,
    AudioColumn,
    Augment,
    BackboneName,
    BatchSize,
    CacheDtype,
    CachePrecision,
    ClassesFile,
    DataName,
    Device,
    Epochs,
    ImageColumn,
    Json,
    Label,
    Out,
    ProblemName,
    Quantize,
    Random,
    ScaledJpeg,
    Seconds,
    SkipBad,
    StoreFolder,
    Text,
    Weights,
    Whole,
    add_heading,
    command,
    complete_method,
    group,
    messages,
    option,
    parse_place,
    show_json,
)
from restuning.cli.config import Config
from restuning.cli.results import log_to
from restuning.cli.speech import is_quiet

if TYPE_CHECKING:
    from rich.console import Console

    from restuning.search.sweep import OnProgress

app = group("Train a grid of settings.")


@command(
    app,
    "restuning sweep digits --grid lr=1e-3,5e-3,rank=5,10 --seeds 3",
    "restuning sweep photos/ --method linear --grid lr=1e-3,1e-2,1e-1 --seeds 1",
    name="sweep",
)
def sweep_command(
    data: DataName,
    grid: Annotated[
        str,
        option(METHOD, "lr=1e-3,5e-3,rank=5,10; also lambda, wd, clip, batch, epochs, scale, ..."),
    ],
    method: Annotated[
        str, option(METHOD, "A bypass method, or linear", autocompletion=complete_method)
    ] = "res-tuning-bypass",
    seeds: Annotated[int, option(OPTIMISER, "Runs of every setting", min=1)] = 3,
    epochs: Epochs = None,
    batch_size: BatchSize = 64,
    augment: Augment = "none",
    skip_bad: SkipBad = False,
    text: Text = "text",
    label: Label = "label",
    image: ImageColumn = None,
    audio: AudioColumn = None,
    seconds: Seconds = None,
    problem: ProblemName = None,
    classes: ClassesFile = None,
    whole: Whole = False,
    scaled_jpeg: ScaledJpeg = False,
    backbone: BackboneName = "restuning-tiny",
    weights: Weights = None,
    random: Random = False,
    quantize: Quantize = None,
    device: Device = None,
    store: StoreFolder = None,
    cache_dtype: CacheDtype = "fp32",
    cache_precision: CachePrecision = "fp32",
    memory: Annotated[
        str | None,
        option(
            FEATURES,
            "What stored features may take in memory, e.g. 8GB; larger stores are trained from in "
            "portions; default: what is free",
        ),
    ] = None,
    out: Out = None,
    on: Annotated[
        str | None,
        option(OUTPUT, f"{ON_RAY} data, --out and stores"),
    ] = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Train a grid of settings from features computed once; choose on val, test the choice."""
    from restuning.backbones import add_quantization
    from restuning.features import StoreOptions
    from restuning.forecast import parse_bytes
    from restuning.search.on_ray import run_sweep_on_ray
    from restuning.search.sweep import SweepRequest, parse_grid, run_sweep
    from restuning.training.defaults import settings_for
    from restuning.training.run import Source

    address = parse_place(on)
    screen = messages(as_json)
    source = Source(
        data,
        augment,
        skip_bad=skip_bad,
        text=text,
        label=label,
        image=image,
        audio=audio,
        seconds=seconds,
        problem=problem,
        classes=classes,
        whole=whole,
        scaled_jpeg=scaled_jpeg,
        store=StoreOptions(
            store,
            cache_dtype,
            cache_precision,
            log=log_to(screen),
            memory=None if memory is None else parse_bytes(memory),
        ),
    )
    request = SweepRequest(
        source,
        method,
        parse_grid(grid),
        range(seeds),
        settings_for(method, {"epochs": epochs, "batch_size": batch_size}),
        add_quantization(backbone, quantize),
        weights,
        random,
    )
    make = run_sweep if on is None else partial(run_sweep_on_ray, address=address)
    with show_progress(screen) as on_progress:
        result = make(request, out=out, device=device, on_progress=on_progress)
    show_sweep(result.report, screen)
    screen.print(add_heading("left in", str(result.folder)), soft_wrap=True)
    if as_json:
        show_json(result.report)


@contextmanager
def show_progress(console: Console) -> Iterator[OnProgress]:
    """Show a bar of the runs on a terminal, with the best so far beside it."""
    bar = Progress(
        TextColumn("runs"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[best]}", markup=False),
        console=console,
        disable=is_quiet() or not console.is_terminal,
    )
    with bar:
        line = bar.add_task("", total=None, best="")

        def show(done: int, total: int, best: str) -> None:
            bar.update(line, completed=done, total=total, best=best)

        yield show


def show_sweep(report: dict[str, Any], console: Console) -> None:
    """One row a setting, the best first and the chosen one in bold, and a sentence."""
    from restuning.search.sweep import setting_in_words
    from restuning.training.run import metric_of, show_figure

    table = Table(title=f"{report['arms']} runs, {report['seconds']:.1f} s", title_justify="left")
    names = list(report["settings"][0]["setting"])
    metric = metric_of(report)
    shown = metric.replace("_", " ")
    for name in [*names, f"val {shown}", "± std", "lost to NaN", "parameters"]:
        table.add_column(name, justify="right", no_wrap=True)
    # A setting that lost all its runs to NaN has no mean; it goes last.
    for row in sorted(report["settings"], key=lambda r: -(r["mean"] or 0)):
        best = row == report["best"]
        cells = [
            *[str(v) for v in row["setting"].values()],
            show_figure(metric, row["mean"]),
            show_figure(metric, row["std"]),
            str(row["died"]),
            f"{row['trainable_parameters']:,}",
        ]
        table.add_row(*cells, style="bold" if best else "")
    console.print(table)
    final = report["final"]
    if final["mean"] is not None:
        console.print(
            f"chosen on val: {setting_in_words(report['best']['setting'])}; trained on train and val, test "
            f"{shown} {show_figure(metric, final['mean'])} ± {show_figure(metric, final['std'])} over {len(report['seeds'])} seeds"
        )
        averaged = report["average"].get(f"test_{metric}")
        if averaged is not None:
            console.print(
                f"their mean as one task, final/average.task: test {shown} {show_figure(metric, averaged)}"
            )
    else:
        console.print(
            f"chosen on val: {setting_in_words(report['best']['setting'])}; there is no test split to "
            "test the choice on",
            soft_wrap=True,
        )
