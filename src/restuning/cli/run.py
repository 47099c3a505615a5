"""What `eval` and `predict` do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from restuning._errors import DataError
from restuning.backbones import Backbone, Preprocessing, load_backbone
from restuning.data import decode, load_data
from restuning.files import describe, load
from restuning.host import Host
from restuning.train import evaluate
from restuning.tuned import Tuned


def _tuned(
    task: Path, backbone: str | None, weights: Path | None, random: bool
) -> tuple[Tuned, Backbone, dict[str, Any]]:
    description = describe(task)
    name = backbone or description["backbone"]["name"]
    loaded = load_backbone(name, weights=weights, random=random)
    host = Host(loaded.model, *loaded.example, **loaded.kwargs)
    return Tuned(host, load(task, host)).eval(), loaded, description


def evaluate_task(
    task: Path, data: str, *, backbone: str | None, weights: Path | None, random: bool,
    batch_size: int, skip_bad: bool, text: str, label: str,
) -> dict[str, Any]:  # fmt: skip
    """Accuracy, loss and count on the test split."""
    tuned, loaded, description = _tuned(task, backbone, weights, random)
    loaded_data = load_data(data, loaded, skip_bad=skip_bad, text=text, label=label)
    if loaded_data.test is None:
        raise DataError("there is no test split", where=data, fix="give a data set with one")
    trained = description["task"]["labels"]
    if trained and trained != loaded_data.labels:
        raise DataError(
            "the classes of the data are not those of the task", where=data,
            found=f"{loaded_data.num_classes} classes {loaded_data.labels[:4]}; the task has "
            f"{len(trained)}: {trained[:4]}", fix="evaluate on the data it was trained for",
        )  # fmt: skip
    result = evaluate(tuned, loaded_data.test, batch_size, loaded_data.collate)
    return {"task": str(task), "data": loaded_data.name, "method": description["task"]["method"],
            **result}  # fmt: skip


def predict(
    images: Sequence[Path], task: Path, *, backbone: str | None, weights: Path | None,
    random: bool, top: int, batch_size: int, skip_bad: bool,
) -> tuple[list[dict[str, Any]], int]:  # fmt: skip
    """Predictions of every image, and how many files were skipped."""
    tuned, loaded, description = _tuned(task, backbone, weights, random)
    if loaded.preprocessing is None:
        raise DataError("predict takes images", where=str(task), fix="give an image task")
    stored = description["preprocessing"]
    preprocessing = Preprocessing.from_dict(stored) if stored else loaded.preprocessing
    files: list[Path] = []
    for path in images:
        files += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    labels = description["task"]["labels"]
    results: list[dict[str, Any]] = []
    skipped = 0
    for start in range(0, len(files), batch_size):
        names, tensors = [], []
        for file in files[start : start + batch_size]:
            try:
                tensors.append(preprocessing.image(decode(file)))
                names.append(file)
            except DataError:
                if not skip_bad:
                    raise
                skipped += 1
        if not tensors:
            continue
        with torch.inference_mode():
            chances = tuned(torch.stack(tensors)).softmax(-1)
        best = chances.topk(min(top, chances.shape[-1]))
        for name, values, indices in zip(names, best.values, best.indices, strict=True):
            results.append(
                {
                    "image": str(name),
                    "predictions": [
                        {"label": labels[i] if labels else str(i), "probability": p}
                        for p, i in zip(values.tolist(), indices.tolist(), strict=True)
                    ],
                }
            )
    return results, skipped
