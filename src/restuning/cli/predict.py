"""`restuning predict`: images or texts labelled by one task, or by many from one forward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from restuning.cli.common import (
    OUTPUT,
    AnyBackbone,
    BatchSize,
    Json,
    Random,
    RowStream,
    SkipBad,
    TaskBackbone,
    Text,
    Weights,
    command,
    group,
    option,
)

app = group("Label inputs.")


@command(
    app,
    "restuning predict photo.jpg --task pets.task --top 3",
    "restuning predict photos/ --tasks pets.task,scenes.task,quality.task --json",
    "restuning predict 'a film to remember' --task reviews.task",
    "restuning predict new.csv --task reviews.task --text review --json",
)
def predict(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Images or folders; for a text task texts, .csv, .txt (a text a line), or -"
        ),
    ],
    task: Annotated[Path | None, typer.Option(help="Task folder")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Task folders, with commas; bypass tasks share one backbone forward"),
    ] = None,
    skip_bad: SkipBad = False,
    text: Text = "text",
    backbone: TaskBackbone = None,
    weights: Weights = None,
    random: Random = False,
    any_backbone: AnyBackbone = False,
    top: Annotated[int, option(OUTPUT, "Classes to show", min=1)] = 1,
    batch_size: BatchSize = 64,
    as_json: Json = False,
) -> None:
    """Label images or texts with one task or many; a table, or one JSON line each as it is done."""
    from restuning.cli.predicting import Predictor

    folders = [*([task] if task else []), *(Path(t) for t in (tasks or "").split(",") if t)]
    if not folders:
        raise typer.BadParameter("give --task FOLDER or --tasks FOLDER,FOLDER,...")
    predictor = Predictor.load(
        folders,
        backbone=backbone,
        weights=weights,
        random=random,
        skip_bad=skip_bad,
        text=text,
        any_backbone=any_backbone,
    )
    kind, named = predictor.inputs.kind, predictor.inputs.named(inputs)
    table = None if as_json else RowStream(predictor.widths(named, top, several=bool(tasks)))
    for name, answers in predictor.answers(named, batch_size, top):
        single = next(iter(answers.values()))
        if table is None:
            line = {"tasks": answers} if tasks else {"predictions": single}
            typer.echo(json.dumps({kind: name, **line}))
        elif kind == "words":
            # A sentence is many answers: a line a word, and an empty line as the file had it.
            for place, word in enumerate(name):
                best_of = {t: _percent(best[place][0]) for t, best in answers.items()}
                table.row({kind: word, **best_of})
            table.row(dict.fromkeys([kind, *answers], ""))
        elif tasks:
            table.row({kind: name, **{t: _percent(best[0]) for t, best in answers.items()}})
        else:
            best = {f"{place + 1}": _percent(each) for place, each in enumerate(single)}
            table.row({kind: name, **best})
    if table is not None:
        typer.echo(
            f"{len(folders)} task{'s' * (len(folders) > 1)}, "
            f"{predictor.together.forwards} backbone forward(s) a batch"
        )
    if predictor.inputs.skipped:
        typer.echo(f"{len(predictor.inputs.skipped)} corrupt files skipped", err=True)


def _percent(prediction: dict[str, Any]) -> str:
    return f"{prediction['label']} ({prediction['probability']:.1%})"
