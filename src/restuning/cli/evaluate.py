"""`restuning eval`: a saved task on the test split of a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from restuning.cli.common import (
    AnyBackbone,
    BatchSize,
    Json,
    Label,
    Random,
    SkipBad,
    TaskBackbone,
    Text,
    Weights,
    command,
    group,
    show_json,
    show_rows,
)

app = group("Test a task.")


@command(
    app,
    "restuning eval runs/x/digits.task digits",
    "restuning eval reviews.task new.csv --text review --label verdict --json",
    name="eval",
)
def evaluate(
    task: Annotated[Path, typer.Argument(help="Task folder")],
    data: Annotated[str, typer.Argument(help="As for train; its test split is used")],
    skip_bad: SkipBad = False,
    text: Text = "text",
    label: Label = "label",
    backbone: TaskBackbone = None,
    weights: Weights = None,
    random: Random = False,
    any_backbone: AnyBackbone = False,
    batch_size: BatchSize = 64,
    as_json: Json = False,
) -> None:
    """Accuracy of a saved task on the test split of a data set."""
    result = evaluate_task(
        task,
        data,
        backbone=backbone,
        weights=weights,
        random=random,
        batch_size=batch_size,
        skip_bad=skip_bad,
        text=text,
        label=label,
        any_backbone=any_backbone,
    )
    if as_json:
        show_json(result)
    else:
        show_rows([result], f"{task} on {data}")


def evaluate_task(
    task: Path,
    data: str,
    *,
    backbone: str | None,
    weights: Path | None,
    random: bool,
    batch_size: int,
    skip_bad: bool,
    text: str,
    label: str,
    any_backbone: bool = False,
) -> dict[str, Any]:
    """Accuracy, loss and count on the test split."""
    from restuning._errors import DataError
    from restuning.backbones import load_backbone
    from restuning.data import LONGEST_TEXT, load_data
    from restuning.task import Tuned, describe, load
    from restuning.training import evaluate

    description = describe(task)
    name = backbone or description["backbone"]["name"]
    loaded = load_backbone(name, weights=weights, random=random)
    host = loaded.host()
    tuned = Tuned(host, load(task, host, any_backbone=any_backbone)).eval()
    longest = description["preprocessing"].get("max_tokens", LONGEST_TEXT)
    loaded_data = load_data(
        data, loaded, skip_bad=skip_bad, text=text, label=label, max_tokens=longest
    )
    if loaded_data.test is None:
        raise DataError("there is no test split", where=data, fix="give a data set with one")
    trained = description["task"]["labels"]
    if trained and trained != loaded_data.labels:
        raise DataError(
            "the classes of the data are not those of the task",
            where=data,
            found=f"{loaded_data.num_classes} classes {loaded_data.labels[:4]}; the task has "
            f"{len(trained)}: {trained[:4]}",
            fix="evaluate on the data it was trained for",
        )
    result = evaluate(tuned, loaded_data.test, batch_size, loaded_data.collate)
    return {
        "task": str(task),
        "data": loaded_data.name,
        "method": description["task"]["method"],
        **result,
    }
