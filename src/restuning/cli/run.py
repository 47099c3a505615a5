"""What `eval` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from restuning._errors import DataError
from restuning.backbones import Backbone, load_backbone
from restuning.data import LONGEST_TEXT, load_data
from restuning.task import Tuned, describe, load
from restuning.training import evaluate


def _tuned(
    task: Path, backbone: str | None, weights: Path | None, random: bool, any_backbone: bool
) -> tuple[Tuned, Backbone, dict[str, Any]]:
    description = describe(task)
    name = backbone or description["backbone"]["name"]
    loaded = load_backbone(name, weights=weights, random=random)
    host = loaded.host()
    return Tuned(host, load(task, host, any_backbone=any_backbone)).eval(), loaded, description


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
    tuned, loaded, description = _tuned(task, backbone, weights, random, any_backbone)
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
