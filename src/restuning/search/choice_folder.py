"""Decisions in files, one for each candidate, so that a killed choice goes on and ends the same."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from restuning._errors import FormatError
from restuning._files import digest_file
from restuning.search.folder import SearchFolder
from restuning.search.rule import score_of
from restuning.training.calibrate import has_calibration
from restuning.training.checkpoint import FINAL, read_newest

ENDED = "sha256 of weights"
"""Name under which a row holds the digest of what its trial ended with."""

STATUS = ("left out", "begun", "stopped", "tried")
"""`begun`: the budget allowed it, and that is not asked again: time has passed since."""


class ChoiceFolder:
    """Rows of candidates and the runs of their trials.

    Args:
        folder: Folder of the choice.
        identity: The values that must agree between all calls on the folder, as JSON.
        resume: False forgets what it holds.

    Raises:
        TrainingError: The folder was begun for another choice.
        FormatError: What it holds is damaged, or cannot be written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], resume: bool = True) -> None:
        what = "this folder holds a choice that was begun otherwise"
        self.folder = folder
        self.rows = SearchFolder(folder, identity, file="identity.json", what=what, resume=resume)

    def read(self, method: str) -> dict[str, Any] | None:
        """The row of a candidate, or None."""
        if not self.rows.has(method):
            return None
        row = self.rows.read(method)
        row.pop(ENDED, None)
        status, seconds = row.get("status"), row.get("seconds")
        # A row decides what is taken, so one that is damaged must not pass for a trial.
        valid = row.get("method") == method and status in STATUS and _number(seconds)
        if status == "left out":
            valid = valid and isinstance(row.get("why"), str)
        if status == "begun":
            final = row.get("final_seconds", "")
            valid = valid and (final is None or _number(final))
        if status in ("tried", "stopped"):
            valid = valid and all(_whole(row.get(name)) for name in ("epochs", "accumulate"))
            valid = valid and row.get("form") in ("stored", "live")
            valid = valid and _number(row.get("lr")) and _is_score(row)
            valid = (
                valid and isinstance(row.get("goes_on"), bool) and _number(row.get("cross_entropy"))
            )
            valid = valid and has_calibration(row)
        if not valid:
            raise FormatError(
                "a row of a choice is malformed",
                where=str(self.rows.path(method)),
                found=str(row)[:200],
                fix="delete it and run the same command again",
            )
        return row

    def write(self, row: Mapping[str, Any]) -> None:
        """Keep a row, and which weights its trial ended with."""
        self.rows.write({**row, ENDED: self._digest(row)}, row["method"])

    def _digest(self, row: Mapping[str, Any]) -> str | None:
        if row["status"] not in ("tried", "stopped"):
            return None
        file = self._checkpoints(row["method"], row["lr"]) / FINAL
        # A trial from a bank of several leaves none.
        return digest_file(file) if file.is_file() else None

    def _checkpoints(self, method: str, rate: float) -> Path:
        return self.run_folder(method, rate) / "checkpoints"

    def run_folder(self, method: str, rate: float) -> Path:
        """Folder of a candidate's run at a rate."""
        return self.folder / "fits" / method / f"lr={rate:g}"

    def weights(self, method: str, rate: float) -> dict[str, Tensor]:
        """The weights which that run ended with.

        Raises:
            FormatError: It is no longer there.
        """
        # A finished run's checkpoint holds the task alone, with the weights it was scored by.
        folder = self._checkpoints(method, rate)
        snapshot = read_newest(folder)
        wanted = self.rows.read(method).get(ENDED)
        if snapshot is not None and wanted and digest_file(folder / FINAL) != wanted:
            raise FormatError(
                "the weights of a trial are not those it ended with",
                where=str(folder / FINAL),
                found="another sha256",
                fix=f"delete {self.rows.path(method)} and run the same command again, which tries it again",
            )
        if snapshot is None:
            raise FormatError(
                "the weights of a trial are gone",
                where=str(self.run_folder(method, rate)),
                found="no checkpoint",
                fix=f"delete {self.rows.path(method)} and run the same command again, which tries it again",
            )
        return snapshot.part("task")

    def remove_others(self, method: str, rate: float) -> None:
        """Remove the runs of all trials but one."""
        for folder in self.folder.glob("fits/*/*"):
            # The one that stays is what a choice called again takes its weights from.
            if folder != self.run_folder(method, rate):
                shutil.rmtree(folder, ignore_errors=True)


def _is_score(row: Mapping[str, Any]) -> bool:
    score = score_of(row)
    if row.get("metric", "accuracy") == "accuracy":
        return _number(score) and float(score or 0) <= 1
    # Others may be below zero.
    return isinstance(score, int | float) and not isinstance(score, bool) and score <= 1


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
