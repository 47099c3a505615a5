"""What `sweep` does."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from restuning._errors import TrainingError
from restuning.backbones import load_backbone
from restuning.features.stored import VIEWS_OF
from restuning.search.sweep import parse_grid, sweep
from restuning.training import FitSettings
from restuning.training.device import on_device
from restuning.training.run import Source


def run(
    source: Source,
    method: str,
    grid: str,
    seeds: int,
    base: FitSettings,
    *,
    backbone: str,
    weights: Path | None,
    random: bool,
    out: Path | None,
    console: Console,
) -> dict[str, Any]:
    """Store the features, train the grid, print the table and draw the picture."""
    values = parse_grid(grid)
    if source.augment not in VIEWS_OF:
        raise TrainingError(
            "a sweep trains from stored features",
            where=f"--augment {source.augment}",
            fix="give none or flip",
        )
    torch.manual_seed(0)
    loaded = load_backbone(backbone, weights=weights, random=random)
    with on_device(None) as device:
        host = loaded.host()
        host.to(device)
    inputs = source.open(host, loaded)
    folder = out or Path("runs") / f"{inputs.data.name}-sweep-{time.strftime('%Y%m%d-%H%M%S')}"
    bar = Progress(
        TextColumn("arms"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[best]}"),
        console=console,
        disable=not console.is_terminal,
    )
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
    console.print(f"left in [bold]{folder}[/bold]")
    return report


def _table(report: dict[str, Any], console: Console) -> None:
    table = Table(title=f"{report['arms']} arms, {report['seconds']:.1f} s", title_justify="left")
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
