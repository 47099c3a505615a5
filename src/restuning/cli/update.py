"""`restuning update`: examples added to a solved task, or taken out, without its data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from restuning.cli.common import (
    DATA,
    AudioColumn,
    Device,
    ImageColumn,
    Json,
    Label,
    SkipBad,
    TaskBackbone,
    Text,
    Weights,
    command,
    group,
    messages,
    option,
    show_json,
    show_rows,
)
from restuning.cli.results import log_to

app = group("Update a task.")


@command(
    app,
    "restuning update runs/photos/photos.task more/",
    "restuning update runs/photos/photos.task wrong/ --remove",
    "restuning update runs/species table.csv --image path --label species",
    "restuning update runs/reviews/reviews.task new.csv --text review --label verdict",
)
def update(
    task: Annotated[
        Path, typer.Argument(help="Task folder of method ridge, or its run folder, with its sums")
    ],
    data: Annotated[
        str, typer.Argument(help="A folder with a folder a class (one is enough), a csv or a table")
    ],
    remove: Annotated[
        bool, option(DATA, "Take these examples out of the task", "--remove")
    ] = False,
    text: Text = "text",
    image: ImageColumn = None,
    audio: AudioColumn = None,
    label: Label = "label",
    skip_bad: SkipBad = False,
    backbone: TaskBackbone = None,
    weights: Weights = None,
    device: Device = None,
    batch_size: Annotated[int, option(DATA, "Inputs of one forward", "--batch-size", min=1)] = 256,
    as_json: Json = False,
) -> None:
    """Add labelled examples to a task of method ridge, or take some out; no other data are read."""
    from restuning.search.update import update as update_task

    screen = messages(as_json)
    result = update_task(
        task,
        data,
        remove=remove,
        backbone=backbone,
        weights=weights,
        device=device,
        batch_size=batch_size,
        text=text,
        image=image,
        audio=audio,
        label=label,
        skip_bad=skip_bad,
        log=log_to(screen),
    )
    if as_json:
        show_json(result.to_dict())
        return
    pairs = {"rows": result.rows, "classes": result.classes}
    rows = [{"": name, "before": old, "now": new} for name, (old, new) in pairs.items()]
    old, new = (f"{each:.2%}" for each in result.accuracy)
    rows.append({"": "accuracy of rows left out", "before": old, "now": new})
    show_rows(rows, f"{result.folder}")
