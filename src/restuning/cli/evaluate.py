"""`restuning eval`: a saved task on the test split of a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from restuning.cli.common import (
    OUTPUT,
    AnyBackbone,
    AudioColumn,
    ClassesFile,
    Device,
    ForwardBatch,
    ImageColumn,
    InTiles,
    Json,
    Label,
    ProblemName,
    Random,
    Revision,
    SkipBad,
    TaskBackbone,
    Text,
    Weights,
    Whole,
    WindowSide,
    add_heading,
    command,
    group,
    open_console,
    option,
    read_tiles,
    show_json,
    show_rows,
)
from restuning.cli.predict import open_predictor

app = group("Test a task.")

MOST_OUTPUTS = 40
"""Classes, or numbers, up to which each has a row on the screen."""


@command(
    app,
    "restuning eval runs/x/digits.task digits",
    "restuning eval runs/x/digits.task digits --out runs/x/eval",
    "restuning eval reviews.task new.csv --text review --label verdict --json",
    name="eval",
)
def evaluate(
    task: Annotated[Path, typer.Argument(help="Task folder, run folder, or a name on the hub")],
    data: Annotated[str, typer.Argument(help="As for train; its test split is used")],
    skip_bad: SkipBad = False,
    text: Text = "text",
    label: Label = "label",
    image: ImageColumn = None,
    audio: AudioColumn = None,
    problem: ProblemName = None,
    classes: ClassesFile = None,
    whole: Whole = False,
    tiles: InTiles = False,
    window: WindowSide = None,
    revision: Revision = None,
    backbone: TaskBackbone = None,
    weights: Weights = None,
    random: Random = False,
    any_backbone: AnyBackbone = False,
    batch_size: ForwardBatch = 64,
    device: Device = None,
    out: Annotated[
        Path | None,
        option(
            OUTPUT,
            "Folder for report.html, eval.json, predictions.csv and outputs.csv (figures of each class)",
            "--out",
        ),
    ] = None,
    rows: Annotated[
        str | None, option(OUTPUT, "Form of predictions in --out: csv (default) or jsonl")
    ] = None,
    as_json: Json = False,
) -> None:
    """Accuracy (or other figures) of a saved task on a test split, and how far its probabilities are off."""
    from restuning.data import DataOptions
    from restuning.task import find_origin
    from restuning.training.evaluate_task import judge_loaded, load_for
    from restuning.training.report_again import (
        check_place,
        refuse_other_evaluation,
        warn_of_change,
        write_evaluation,
    )

    if rows not in (None, "csv", "jsonl"):
        raise typer.BadParameter("give csv or jsonl", param_hint="--rows")
    if out is not None:
        check_place(out, rows or "csv")
    elif rows is not None:
        raise typer.BadParameter(
            "predictions are written into --out FOLDER: give it as well", param_hint="--rows"
        )
    predictor, folders = open_predictor(
        [task],
        random,
        revision=revision,
        backbone=backbone,
        weights=weights,
        device=device,
        any_backbone=any_backbone,
        batch_size=batch_size,
        tiles=read_tiles(tiles, window),
    )
    options = DataOptions(
        skip_bad=skip_bad,
        text=text,
        label=label,
        image=image,
        audio=audio,
        problem=problem,
        classes=classes,
        whole=whole,
    )
    origin = find_origin(next(iter(folders.values())))
    named = {"task": origin or str(task)}
    own, loaded = load_for(predictor, data, options)
    warn_of_change(next(iter(folders.values())), loaded)
    if out is not None:
        refuse_other_evaluation(out, {**named, "data": loaded.name})
    if tiles:
        from restuning.training.evaluate_tiles import judge_in_tiles

        found = judge_in_tiles(predictor, own, loaded)
    else:
        found = judge_loaded(predictor, own, loaded, batch_size)
    result = {**named, **found.result}
    if out is not None:
        call = {
            "data": data,
            "text": text,
            "label": label,
            "image": image,
            "audio": audio,
            "tiles": tiles,
            "window": window,
        }
        write_evaluation(found, result, out, next(iter(folders.values())), call, rows or "csv")
    if as_json:
        show_json(result)
        return
    left_out = result.pop("left out", "")
    # A row of all of them is wider than a terminal; what a temperature did is told below it.
    names = ("nll", "ece_uncalibrated", "temperature")
    told = {name: result.pop(name) for name in names if name in result}
    first = ("task", "data", "method", found.task.problem.metric, "loss", "count", "ece")
    more = {name: result.pop(name) for name in list(result) if name not in first}
    show_rows([result], f"{task} on {data}{', in windows' if tiles else ''}")
    if more:
        show_rows([more], "more figures")
    each = found.judged.breakdown
    if each is not None and len(each.names) <= MOST_OUTPUTS:
        from restuning.report.page import tell_figure

        shown = [
            {n: v if n == "name" else tell_figure(v, n in each.shares) for n, v in row.items()}
            for row in each.rows()
        ]
        show_rows(shown, each.noun or found.task.problem.noun)
    if told.get("temperature", 1) != 1:
        before, after = told["ece_uncalibrated"], result["ece"]
        words = f"calibration error (ece) {before:.1%} without it, {after:.1%} with it"
        open_console().print(f"temperature {told['temperature']:.3g}: {words}", soft_wrap=True)
    if out is not None:
        open_console().print(add_heading("left in", str(out)), soft_wrap=True)
    if left_out:
        open_console().print(f"left out: {left_out}", soft_wrap=True)
