"""Several columns of answers of one table: a task for each, trained from one store in one command."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from restuning._errors import DataError
from restuning._files import write_json
from restuning.training.run import Run

METRICS = "metrics.json"
RUNS = "runs"
"""Folder of the runs, in that of the tasks."""
LONGEST = 100
"""Bytes of a column's name in that of its folder: file systems take 255, and more is added to it."""


@dataclass(frozen=True)
class Columns:
    """A task for each column of answers of a table.

    Attributes:
        runs: By column.
        folder: Where they lie: `COLUMN.task` each, `metrics.json`, and `runs/COLUMN/` with what a run leaves.
        metrics: As `metrics.json`: in `columns` for each its problem and the figures of the test split.
    """

    runs: Mapping[str, Run]
    folder: Path
    metrics: dict[str, Any] = field(repr=False)

    @classmethod
    def of(cls, runs: Mapping[str, Run], folder: Path) -> Columns:
        """Of finished runs."""
        columns = {column: _describe(run) for column, run in runs.items()}
        first = next(iter(runs.values())).metrics
        shared = ("backbone", "weights", "fingerprint", "features", "versions", "hardware")
        data = {name: first["data"][name] for name in ("name", "skipped")}
        return cls(
            dict(runs),
            folder,
            {"columns": columns, "data": data, **{name: first.get(name) for name in shared}},
        )

    def __getitem__(self, column: str) -> Run:
        """The run of a column."""
        return self.runs[column]

    def save(self) -> None:
        """Leave `metrics.json` in the folder."""
        write_json(self.folder / METRICS, self.metrics)

    def rows(self) -> list[dict[str, Any]]:
        """The figures that are shown, a row a column."""
        return [{"column": column, **run.row()} for column, run in self.runs.items()]


def _describe(run: Run) -> dict[str, Any]:
    metrics = run.metrics
    told = ("problem", "method", "test", "trainable_parameters", "seconds")
    return {
        **{name: metrics[name] for name in told},
        f"val_{run.metric}": run.val_score,
        "task": run.task_folder.name,
    }


def _name_folder(column: str) -> str:
    name = re.sub(r"[^\w .()+-]", "_", column).strip(" .") or "_"
    if len(name.encode()) <= LONGEST:
        return name
    cut = name.encode()[:LONGEST].decode("utf-8", "ignore").strip(" .")
    return f"{cut}-{hashlib.sha256(column.encode()).hexdigest()[:8]}"


def name_folders(columns: Sequence[str]) -> dict[str, str]:
    """A name of a folder for each column, which may be called anything.

    Raises:
        DataError: Two of them would have one.
    """
    names = {c: _name_folder(c) for c in columns}
    alike = [
        c
        for c, name in names.items()
        if list(map(str.lower, names.values())).count(name.lower()) > 1
    ]
    if alike:
        raise DataError(
            "columns of a table would have one folder",
            found=", ".join(map(repr, alike[:4])),
            fix="rename one of them",
        )
    return names
