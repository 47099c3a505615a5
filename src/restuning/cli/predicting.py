"""What `predict` does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from restuning._errors import DataError
from restuning.backbones import Preprocessing, load_backbone
from restuning.cli.inputs import Images, Inputs, Sentences, Texts
from restuning.data import TagBatch, make_text_batch
from restuning.task import MultiTask, describe, load


@dataclass(frozen=True)
class Predictor:
    """Tasks on one backbone, ready for images or texts.

    Attributes:
        together: The tasks; every batch costs `together.forwards` backbone forwards.
        labels: Class names by task; None where the task has none.
        inputs: How what the user names becomes an input.
    """

    together: MultiTask
    labels: dict[str, list[str] | None]
    inputs: Inputs

    @classmethod
    def load(
        cls,
        tasks: Sequence[Path],
        *,
        backbone: str | None,
        weights: Path | None,
        random: bool,
        skip_bad: bool,
        text: str,
        any_backbone: bool = False,
    ) -> Predictor:
        """Load the tasks on the one backbone that all of them name.

        Raises:
            DataError: The tasks are of several backbones, or prepare their inputs in several ways.
        """
        descriptions = {_name(path): describe(path) for path in tasks}
        if len(descriptions) < len(tasks):
            raise DataError(
                "two tasks have one name",
                found=", ".join(_name(p) for p in tasks),
                fix="rename a task folder",
            )
        names = {d["backbone"]["name"] for d in descriptions.values()}
        if backbone is None and len(names) > 1:
            raise DataError(
                "tasks of several backbones cannot share a forward",
                found=", ".join(sorted(names)),
                fix="predict with the tasks of one backbone at a time",
            )
        loaded = load_backbone(backbone or names.pop(), weights=weights, random=random)
        host = loaded.host()
        if torch.cuda.is_available():
            host.cuda()
        ready = {
            name: load(path, host, any_backbone=any_backbone)
            for name, path in zip(descriptions, tasks, strict=True)
        }
        stored = [d["preprocessing"] for d in descriptions.values() if d["preprocessing"]]
        if any(other != stored[0] for other in stored):
            raise DataError(
                "the tasks prepare their inputs in different ways",
                found=str(stored[:2])[:200],
                fix="predict with them one at a time",
            )
        if loaded.tokenizer is not None:
            batch = make_text_batch(loaded.tokenizer, stored[0] if stored else {})
            words = isinstance(batch, TagBatch)
            inputs: Inputs = Sentences(batch, text) if words else Texts(batch, text)  # type: ignore[arg-type]
        elif stored or loaded.preprocessing is not None:
            own = Preprocessing.from_dict(stored[0]) if stored else loaded.preprocessing
            inputs = Images(own, skip_bad)  # type: ignore[arg-type]
        else:
            raise DataError(
                "nothing says how inputs are prepared",
                where=str(tasks[0]),
                fix="train the task again with `restuning train`",
            )
        labels = {n: d["task"]["labels"] for n, d in descriptions.items()}
        return cls(MultiTask(host, ready), labels, inputs)

    def answers(
        self, named: Sequence[Any], batch_size: int, top: int
    ) -> Iterator[tuple[Any, dict[str, list[Any]]]]:
        """Each input with its best classes by task, as soon as its batch is done.

        For tagged words there is a list of best classes for every word.

        Args:
            named: What `inputs.named` gives.
            batch_size: Inputs of one forward.
            top: Classes of one answer.
        """
        device = self.together.host.device
        for start in range(0, len(named), batch_size):
            batch = self.inputs.batch(named[start : start + batch_size])
            if not batch.names:
                continue
            with torch.inference_mode():
                logits = self.together(
                    *(x.to(device) for x in batch.args),
                    **{k: v.to(device) for k, v in batch.kwargs.items()},
                )
            chances = {task: values.float().softmax(-1).cpu() for task, values in logits.items()}
            for row, name in enumerate(batch.names):
                if batch.words is None:
                    found = {t: self._best(t, values[row], top) for t, values in chances.items()}
                else:
                    places = batch.words[row].values()
                    found = {
                        t: [self._best(t, values[row, place], top) for place in places]
                        for t, values in chances.items()
                    }
                    # Words beyond the tokens that are read have no answer.
                    name = name[: len(batch.words[row])]
                yield name, found

    def widths(self, named: Sequence[Any], top: int, *, several: bool) -> dict[str, int]:
        """Columns of the table of answers, wide enough for every label."""

        def widest(task: str) -> int:
            return max(map(len, self.labels[task] or ["0000"])) + len(" (100.0%)")

        first = {self.inputs.kind: max(map(self.inputs.width, named), default=0)}
        if several or self.inputs.kind == "words":
            return first | {task: widest(task) for task in self.labels}
        (task,) = self.labels
        classes = len(self.labels[task] or []) or top
        return first | {f"{place + 1}": widest(task) for place in range(min(top, classes))}

    def _best(self, task: str, chances: torch.Tensor, top: int) -> list[dict[str, Any]]:
        best, labels = chances.topk(min(top, len(chances))), self.labels[task]
        return [
            {"label": labels[i] if labels else str(i), "probability": p}
            for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]


def _name(task: Path) -> str:
    return task.name.removesuffix(".task")
