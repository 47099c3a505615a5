"""`restuning eval`: a saved task on the test split of a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    open_console,
    show_json,
    show_rows,
)
from restuning.cli.predict import open_predictor

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
    """Accuracy of a saved task on the test split of a data set, and how far its probabilities are off."""
    from restuning.data import DataOptions
    from restuning.training import evaluate_task

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
        return
    left_out = result.pop("left out", "")
    # A row of all of them is wider than a terminal; what a temperature did is told below it.
    told = {name: result.pop(name) for name in ("nll", "ece_uncalibrated", "temperature")}
    show_rows([result], f"{task} on {data}")
    if told["temperature"] != 1:
        before, after = told["ece_uncalibrated"], result["ece"]
        words = f"calibration error (ece) {before:.1%} without it, {after:.1%} with it"
        open_console().print(f"temperature {told['temperature']:.3g}: {words}", soft_wrap=True)
    if left_out:
        open_console().print(f"left out: {left_out}", soft_wrap=True)
