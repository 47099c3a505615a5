"""What was decided, a file for each candidate, so that a killed choice goes on and ends the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from restuning._errors import FormatError, TrainingError
from restuning._files import read_json, write_json
from restuning.training.checkpoint import newest

STATUS = ("left out", "begun", "stopped", "tried")
"""`begun`: the budget allowed it, and that is not asked again: time has passed since."""


class Journal:
    """Rows of candidates in a folder; each is written whole or not at all.

    Args:
        folder: Its own.
        identity: What must agree between all calls on the folder, as JSON.
        resume: False forgets what it holds.

    Raises:
        TrainingError: The folder was begun for another choice.
        FormatError: What it holds is damaged, or cannot be written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], resume: bool = True) -> None:
        self.folder = folder
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)
        now = json.loads(json.dumps(identity))
        file = folder / "identity.json"
        if not file.exists():
            write_json(file, now)
            return
        before = read_json(file)
        differs = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if differs:
            raise TrainingError(
                "this folder holds a choice that was begun otherwise",
                where=str(folder),
                found="; ".join(
                    f"{n}: {before.get(n)!r} then, {now.get(n)!r} now" for n in differs
                )[:600],
                fix="use what was used then, another --out, or --no-resume to start over",
            )

    def read(self, method: str) -> dict[str, Any] | None:
        """The row of a candidate, or None."""
        file = self._file(method)
        if not file.exists():
            return None
        row = read_json(file)
        status, seconds = row.get("status"), row.get("seconds")
        whole = row.get("method") == method and status in STATUS and _number(seconds)
        if status in ("tried", "stopped"):
            score = row.get("val_accuracy")
            whole = whole and _number(row.get("lr")) and _number(score) and bool(score <= 1)  # type: ignore[operator]
            whole = (
                whole and isinstance(row.get("goes_on"), bool) and _number(row.get("cross_entropy"))
            )
        if not whole:
            raise FormatError(
                "a row of a choice is malformed",
                where=str(file),
                found=str(row)[:200],
                fix="delete it and run the same command again",
            )
        return row

    def write(self, row: Mapping[str, Any]) -> None:
        """Keep a row."""
        write_json(self._file(row["method"]), row)

    def fit(self, method: str, rate: float) -> Path:
        """Folder of a candidate's run at a rate."""
        return self.folder / "fits" / method / f"lr={rate:g}"

    def weights(self, method: str, rate: float) -> dict[str, Tensor]:
        """What that run ended with.

        Raises:
            FormatError: It is no longer there.
        """
        snapshot = newest(self.fit(method, rate) / "checkpoints")
        if snapshot is None:
            raise FormatError(
                "the weights of a trial are gone",
                where=str(self.fit(method, rate)),
                found="no checkpoint",
                fix=f"delete {self._file(method)} and run the same command again, which tries it again",
            )
        return snapshot.part("task")

    def keep(self, method: str, rate: float) -> None:
        """Remove the runs of all trials but one."""
        for folder in self.folder.glob("fits/*/*"):
            if folder != self.fit(method, rate):
                shutil.rmtree(folder, ignore_errors=True)

    def _file(self, method: str) -> Path:
        return self.folder / f"{method}.json"


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
