"""`restuning report`: the page about a run, made again from what the run left."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from restuning.cli.common import (
    OUTPUT,
    AnyBackbone,
    Device,
    ForwardBatch,
    Random,
    SkipBad,
    TaskBackbone,
    Weights,
    add_heading,
    command,
    group,
    open_console,
    option,
)
from restuning.cli.predict import open_predictor

app = group("Write the page about a run.")


@command(
    app,
    "restuning report runs/photos",
    "restuning report runs/photos photos/ --out photos.html",
    name="report",
)
def report(
    run: Annotated[
        Path, typer.Argument(help="Folder of a run, or of several: of columns, or methods")
    ],
    data: Annotated[
        str | None,
        typer.Argument(help="As for train; default: the data that settings.json names"),
    ] = None,
    skip_bad: SkipBad = False,
    backbone: TaskBackbone = None,
    weights: Weights = None,
    random: Random = False,
    any_backbone: AnyBackbone = False,
    batch_size: ForwardBatch = 64,
    device: Device = None,
    out: Annotated[
        Path | None, option(OUTPUT, "File of the page; default: report.html in the run's folder")
    ] = None,
) -> None:
    """Test a run's task once more and write its page: figures, curves, mistakes, how to use it."""
    from restuning.training.beforehand import try_files
    from restuning.training.report_again import find_runs, open_run, report_run
    from restuning.training.run_report import REPORT, write_report

    runs = find_runs(run)
    if out is not None and len(runs) > 1:
        raise typer.BadParameter(
            f"--out is one file, and {run} has {len(runs)} runs", param_hint="--out"
        )
    files = [each / REPORT if out is None else out for each in runs]
    for file in files:
        try_files(file.parent, [file.name])
    for each, file in zip(runs, files, strict=True):
        opened = open_run(each, data, skip_bad)
        predictor, _ = open_predictor(
            [opened.task],
            random,
            revision=None,
            backbone=backbone,
            weights=weights,
            device=device,
            any_backbone=any_backbone,
        )
        write_report(report_run(opened, predictor, batch_size), file)
        open_console().print(add_heading("report", str(file)), soft_wrap=True)
