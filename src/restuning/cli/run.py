"""What `eval` and `predict` do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from restuning._errors import DataError
from restuning.backbones import Backbone, Preprocessing, load_backbone
from restuning.data import decode, load_data
from restuning.files import describe, load
from restuning.host import Host
from restuning.together import Together
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


@dataclass(frozen=True)
class Predictor:
    """Tasks on one backbone, ready for images.

    Attributes:
        together: The tasks; every batch costs `together.forwards` backbone forwards.
        labels: Class names by task; None where the task has none.
        preprocessing: How an image becomes an input.
        skip_bad: Leave corrupt files out and count them in `skipped`.
    """

    together: Together
    labels: dict[str, list[str] | None]
    preprocessing: Preprocessing
    skip_bad: bool
    skipped: list[Path]

    @classmethod
    def load(
        cls, tasks: Sequence[Path], *, backbone: str | None, weights: Path | None, random: bool,
        skip_bad: bool,
    ) -> Predictor:  # fmt: skip
        """Load the tasks on the one backbone that all of them name."""
        descriptions = {_name(path): describe(path) for path in tasks}
        if len(descriptions) < len(tasks):
            raise DataError("two tasks have one name", found=", ".join(_name(p) for p in tasks),
                            fix="rename a task folder")  # fmt: skip
        names = {d["backbone"]["name"] for d in descriptions.values()}
        if backbone is None and len(names) > 1:
            raise DataError(
                "tasks of several backbones cannot share a forward", found=", ".join(sorted(names)),
                fix="predict with the tasks of one backbone at a time",
            )  # fmt: skip
        loaded = load_backbone(backbone or names.pop(), weights=weights, random=random)
        if loaded.preprocessing is None:
            raise DataError("predict takes images", where=str(tasks[0]), fix="give image tasks")
        host = Host(loaded.model, *loaded.example, **loaded.kwargs)
        if torch.cuda.is_available():
            host.cuda()
        ready = {name: load(path, host) for name, path in zip(descriptions, tasks, strict=True)}
        stored = [d["preprocessing"] for d in descriptions.values() if d["preprocessing"]]
        if any(other != stored[0] for other in stored):
            raise DataError(
                "the tasks prepare images in different ways", found=str(stored[:2])[:200],
                fix="predict with them one at a time",
            )  # fmt: skip
        return cls(
            Together(host, ready),
            {n: d["task"]["labels"] for n, d in descriptions.items()},
            Preprocessing.from_dict(stored[0]) if stored else loaded.preprocessing, skip_bad, [],
        )  # fmt: skip

    def answers(
        self, images: Sequence[Path], batch_size: int, top: int
    ) -> Iterator[tuple[Path, dict[str, list[dict[str, Any]]]]]:
        """Each image with its best classes by task, as soon as its batch is done."""
        files = _files(images)
        device = next(self.together.host.model.parameters()).device
        for start in range(0, len(files), batch_size):
            names, tensors = [], []
            for file in files[start : start + batch_size]:
                try:
                    tensors.append(self.preprocessing.image(decode(file)))
                    names.append(file)
                except DataError:
                    if not self.skip_bad:
                        raise
                    self.skipped.append(file)
            if not tensors:
                continue
            with torch.inference_mode():
                logits = self.together(torch.stack(tensors).to(device))
            chances = {task: values.softmax(-1).cpu() for task, values in logits.items()}
            for row, name in enumerate(names):
                yield name, {t: self._best(t, values[row], top) for t, values in chances.items()}

    def widths(self, images: Sequence[Path], top: int, *, several: bool) -> dict[str, int]:
        """Columns of the table of answers, wide enough for every label."""

        def widest(task: str) -> int:
            return max(map(len, self.labels[task] or ["0000"])) + len(" (100.0%)")

        paths = {"image": max((len(str(file)) for file in _files(images)), default=0)}
        if several:
            return paths | {task: widest(task) for task in self.labels}
        (task,) = self.labels
        classes = len(self.labels[task] or []) or top
        return paths | {f"{place + 1}": widest(task) for place in range(min(top, classes))}

    def _best(self, task: str, chances: torch.Tensor, top: int) -> list[dict[str, Any]]:
        best, labels = chances.topk(min(top, len(chances))), self.labels[task]
        return [
            {"label": labels[i] if labels else str(i), "probability": p}
            for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]


def _files(images: Sequence[Path]) -> list[Path]:
    """Every file named, and every file in a folder named."""
    files: list[Path] = []
    for path in images:
        files += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return files


def _name(task: Path) -> str:
    return task.name.removesuffix(".task")
