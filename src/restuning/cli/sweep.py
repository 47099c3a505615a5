"""`restuning sweep`: a grid of settings from features computed once, chosen on val."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from restuning.cli.common import (
    METHOD,
    OPTIMISER,
    Augment,
    BackboneName,
    BatchSize,
    CacheDtype,
    CachePrecision,
    DataName,
    Device,
    Epochs,
    Json,
    Label,
    Out,
    Quantize,
    Random,
    SkipBad,
    StoreFolder,
    Text,
    Weights,
    command,
    complete_method,
    group,
    headed,
    messages,
    option,
    show_json,
)
from restuning.cli.config import Config
from restuning.cli.report import log_to

if TYPE_CHECKING:
    from rich.console import Console

    from restuning.training import FitSettings
    from restuning.training.run import Source

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
    backbone: BackboneName = "restuning-tiny",
    weights: Weights = None,
    random: Random = False,
    quantize: Quantize = None,
    device: Device = None,
    store: StoreFolder = None,
    cache_dtype: CacheDtype = "fp32",
    cache_precision: CachePrecision = "fp32",
    out: Out = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Train a grid of settings from features computed once; choose on val, test the choice."""
    from restuning.backbones import add_quantization
    from restuning.features import StoreOptions
    from restuning.training.defaults import settings_for
    from restuning.training.run import Source

    screen = messages(as_json)
    source = Source(
        data,
        augment,
        skip_bad=skip_bad,
        text=text,
        label=label,
        store=StoreOptions(store, cache_dtype, cache_precision, log=log_to(screen)),
    )
    report = run_sweep(
        source,
        method,
        grid,
        seeds,
        settings_for(method, {"epochs": epochs, "batch_size": batch_size}),
        backbone=add_quantization(backbone, quantize),
        weights=weights,
        random=random,
        device=device,
        out=out,
        console=screen,
    )
    if as_json:
        show_json(report)


def run_sweep(
    source: Source,
    method: str,
    grid: str,
    seeds: int,
    base: FitSettings,
    *,
    backbone: str,
    weights: Path | None,
    random: bool,
    device: str | None,
    out: Path | None,
    console: Console,
) -> dict[str, Any]:
    """Store the features, train the grid, print the table and draw the picture."""
    import torch

    from restuning._errors import TrainingError
    from restuning.backbones import load_backbone
    from restuning.features.stored import VIEWS_OF
    from restuning.search.sweep import parse_grid, sweep
    from restuning.training.device import on_device

    values = parse_grid(grid)
    if source.augment not in VIEWS_OF:
        raise TrainingError(
            "a sweep trains from stored features",
            where=f"--augment {source.augment}",
            fix="give none or flip",
        )
    torch.manual_seed(0)
    loaded = load_backbone(backbone, weights=weights, random=random)
    host = loaded.host()
    bar = Progress(
        TextColumn("runs"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[best]}", markup=False),
        console=console,
        disable=not console.is_terminal,
    )
    with on_device(device) as place:
        host.to(place)
        inputs = source.open(host, loaded)
        name = f"{inputs.data.name}-sweep-{time.strftime('%Y%m%d-%H%M%S')}"
        folder = out or Path("runs") / name
        with bar:
            line = bar.add_task("", total=None, best="")

            def show(done: int, total: int, best: str) -> None:
                bar.update(line, completed=done, total=total, best=best)

            report = sweep(
                inputs,
                method,
                values,
                seeds=range(seeds),
                settings=base,
                out=folder,
                on_progress=show,
            )
    _table(report, console)
    picture(report, folder / "sweep.png", f"{method} on {inputs.data.name}")
    console.print(headed("left in", str(folder)), soft_wrap=True)
    return report


def _table(report: dict[str, Any], console: Console) -> None:
    table = Table(title=f"{report['arms']} runs, {report['seconds']:.1f} s", title_justify="left")
    names = list(report["settings"][0]["setting"])
    for name in [*names, "val accuracy", "± std", "lost to NaN", "parameters"]:
        table.add_column(name, justify="right", no_wrap=True)
    for row in sorted(report["settings"], key=lambda r: -(r["mean"] or 0)):
        best = row is report["best"] or row == report["best"]
        cells = [
            *[str(v) for v in row["setting"].values()],
            "-" if row["mean"] is None else f"{row['mean']:.2%}",
            f"{row['std']:.2%}",
            str(row["died"]),
            f"{row['trainable_parameters']:,}",
        ]
        table.add_row(*cells, style="bold" if best else "")
    console.print(table)
    final = report["final"]
    if final["mean"] is not None:
        console.print(
            f"chosen on val: {_words(report['best']['setting'])}; trained on train and val, test "
            f"accuracy {final['mean']:.2%} ± {final['std']:.2%} over {len(report['seeds'])} seeds"
        )


def _words(setting: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in setting.items())


def picture(report: dict[str, Any], file: Path, title: str) -> None:
    """Validation accuracy by setting, with the spread over seeds."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = sorted((r for r in report["settings"] if r["mean"] is not None), key=lambda r: r["mean"])
    figure, axes = plt.subplots(figsize=(7, 1.2 + 0.32 * len(rows)), layout="constrained")
    for place, row in enumerate(rows):
        chosen = row["setting"] == report["best"]["setting"]
        colour = "#d9822b" if chosen else "#2a6fbb"
        axes.errorbar(
            100 * row["mean"], place, xerr=100 * row["std"], fmt="o", color=colour, capsize=3
        )
        axes.plot(
            [100 * v for v in row["val_accuracy"]],
            [place] * len(row["val_accuracy"]),
            ".",
            color=colour,
            alpha=0.5,
        )
    axes.set_yticks(range(len(rows)), [_words(r["setting"]) for r in rows], fontsize=8)
    axes.set_xlabel("validation accuracy in %, mean and standard deviation over seeds")
    axes.set_title(title, loc="left")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)
    plt.close(figure)
