"""`restuning eval`: a saved task on the test split of a data set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from restuning.cli.common import (
    AnyBackbone,
    Device,
    ForwardBatch,
    Json,
    Label,
    Random,
    Revision,
    SkipBad,
    TaskBackbone,
    Text,
    Weights,
    command,
    group,
    show_json,
    show_rows,
)
from restuning.cli.predict import open_predictor

if TYPE_CHECKING:
    from restuning.data import DataOptions
    from restuning.serve import Predictor

app = group("Test a task.")


@command(
    app,
    "restuning eval runs/x/digits.task digits",
    "restuning eval reviews.task new.csv --text review --label verdict --json",
    name="eval",
)
def evaluate(
    task: Annotated[Path, typer.Argument(help="Task folder, run folder, or a name on the hub")],
    data: Annotated[str, typer.Argument(help="As for train; its test split is used")],
    skip_bad: SkipBad = False,
    text: Text = "text",
    label: Label = "label",
    revision: Revision = None,
    backbone: TaskBackbone = None,
    weights: Weights = None,
    random: Random = False,
    any_backbone: AnyBackbone = False,
    batch_size: ForwardBatch = 64,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Accuracy of a saved task on the test split of a data set."""
    from restuning.data import DataOptions

    predictor = open_predictor(
        [task],
        random,
        revision=revision,
        backbone=backbone,
        weights=weights,
        device=device,
        any_backbone=any_backbone,
    )
    options = DataOptions(skip_bad=skip_bad, text=text, label=label)
    result = {"task": str(task), **evaluate_task(predictor, data, options, batch_size)}
    if as_json:
        show_json(result)
    else:
        show_rows([result], f"{task} on {data}")


def evaluate_task(
    predictor: Predictor, data: str, options: DataOptions, batch_size: int
) -> dict[str, Any]:
    """Accuracy, loss and count of the only task of a predictor on the test split of a data set."""
    from restuning._errors import DataError
    from restuning.data import load_data
    from restuning.serve.inputs import TextInputs
    from restuning.task import Tuned
    from restuning.training import evaluate

    (task,) = predictor.tasks.values()
    if isinstance(predictor.inputs, TextInputs):
        # As many tokens as the task was trained on.
        options = replace(options, max_tokens=predictor.inputs.collate.longest)
    loaded = load_data(data, predictor.backbone, options)
    if loaded.test is None:
        raise DataError("there is no test split", where=data, fix="give a data set with one")
    # The same classes in another order would be scored, and wrongly, without an error.
    if task.labels and task.labels != loaded.labels:
        raise DataError(
            "the classes of the data are not those of the task",
            where=data,
            found=f"{loaded.num_classes} classes {loaded.labels[:4]}; the task has "
            f"{len(task.labels)}: {task.labels[:4]}",
            fix="evaluate on the data it was trained for",
        )
    tuned = Tuned(predictor.host, task).eval()
    result = evaluate(tuned, loaded.test, batch_size, loaded.collate)
    return {"data": loaded.name, "method": task.method, **result}
