"""The choice of a method and its settings on the validation split, within a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from restuning._errors import DataError, TrainingError
from restuning.problems import Problem
from restuning.problems import from_spec as problem_from_spec
from restuning.search import rule
from restuning.search.budget import Budget, keep_taps_if_memory_is_free
from restuning.search.candidates import CANDIDATES, MORE, NOT_ASKED, SHRINK, Candidate
from restuning.search.choice_folder import ChoiceFolder
from restuning.search.trial import Row, Trials
from restuning.task import Task
from restuning.training import FitSettings
from restuning.training.calibrate import Calibration
from restuning.training.defaults import with_own_lambda_rate
from restuning.training.identity import describe_classes, describe_data, describe_host
from restuning.training.run import Inputs, Log, silent

AUTO = "auto"
"""The name that stands for a choice where a method is asked for."""


@dataclass(frozen=True)
class Choice:
    """The method that was chosen, and the candidates it was chosen from.

    Attributes:
        method: Name of the method.
        lr, epochs, accumulate: Settings of its final run.
        form: "stored" (features once) or "live".
        rows: One a candidate: method, status ("tried", "stopped" early, "left out"), why, accuracy
            on validation with its standard error, cross-entropy there after a temperature of its own,
            the temperature and calibration errors that its answers are given with, the rates tried, memory, seconds.
        examples: Size of the validation split.
        budget: It was made within.
        start: Weights that its final run goes on from, by name; None where it begins anew.
    """

    method: str
    lr: float
    epochs: int
    accumulate: int
    form: str
    rows: list[Row]
    examples: int
    budget: Budget
    start: Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)

    def begin(self, task: Task) -> None:
        """Give a new task of the method the weights that its final run goes on from."""
        keep_taps_if_memory_is_free(task, self.budget)
        if self.start is not None:
            task.load_state_dict(self.start)

    @property
    def calibration(self) -> Calibration:
        """That of the trial that was taken: its final run leaves no answers to held-out data."""
        row = next(each for each in self.rows if each["method"] == self.method)
        return Calibration.from_dict(row).of_another_run()

    @property
    def problem(self) -> Problem | None:
        """With the error bars of the trial that was taken, likewise; None of one class of several."""
        row = next(each for each in self.rows if each["method"] == self.method)
        return problem_from_spec(row["problem"]) if "problem" in row else None

    @property
    def seconds(self) -> float:
        """Wall time of features and trials; of a killed call only what its finished rows took."""
        return sum(row["seconds"] for row in self.rows)

    @property
    def cpu_seconds(self) -> float:
        """Processor time, counted the same way."""
        return sum(row["cpu_seconds"] for row in self.rows)

    def settings(self, base: FitSettings) -> FitSettings:
        """The settings of the final run."""
        settings = replace(base, lr=self.lr, epochs=self.epochs, accumulate=self.accumulate)
        settings = with_own_lambda_rate(settings, self.method)
        # As in its trial.
        return replace(settings, precision="no") if self.form == "stored" else settings

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they are written to JSON; without the weights."""
        plain = {
            each.name: getattr(self, each.name) for each in fields(self) if each.name != "start"
        }
        return {
            **plain,
            "budget": asdict(self.budget),
            "goes_on": self.start is not None,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
        }


def choose_method(
    inputs: Inputs,
    settings: FitSettings,
    out: str | Path,
    *,
    budget: Budget | None = None,
    candidates: Sequence[Candidate] | None = None,
    resume: bool = True,
    log: Log = silent,
    beside: Sequence[Inputs] = (),
) -> Choice:
    """Choose a method, its rate and its epochs on validation; nothing of a test split is read.

    Candidates are tried from the cheapest on. Detached methods are trained from features that are
    stored in one pass for all of them, the rates of one together; then methods inside the backbone. Each trial is a whole
    run, so that none looks better for needing less, but is ended early where it clearly loses
    (`rule.is_lost`). `rule.choose` says which is taken. Where epochs are dear the final run
    goes on from the trial's weights, shrunk, with `candidates.MORE` of its epochs on both splits
    (`Choice.begin`); where they are cheap it begins anew. What the budget does not allow is left
    out with the reason; a batch that memory does not allow is first run in pieces.

    Killed and called again with the same arguments, it goes on and ends with the same choice: what
    the clock decided stands in the folder, and the time that killed parts took is not counted.

    Args:
        inputs: Data with a validation split in front of the frozen backbone, and where features of
            them are stored. The test split is counted and left out: its features are computed for
            the method that is taken, not for all that are tried.
        settings: Base of every run; `epochs` are those of a final run inside the backbone.
        out: Folder of the choice.
        budget: None for no limits.
        candidates: Methods to try, cheapest first; None for `CANDIDATES`, of which what trains through the
            backbone is tried where a budget of time is given.
        resume: False starts over.
        log: Receives a line for each candidate.
        beside: Other answers to the same inputs, for which a method is chosen as well: the one pass stores what their candidates
            read, too.

    Raises:
        TrainingError: The budget is too small for every candidate, or the folder holds another
            choice.
        DataError: There is no validation split.

    Cost: one pass over the data, a trial of each method and the final run of one.
    """
    budget, out = budget or Budget(), Path(out)
    tested = 0 if inputs.data.test is None else len(inputs.data.test)
    # Taken out of both, so that nothing below can read a test split.
    plain = inputs.plain.with_splits(test=None)
    data = inputs.data.with_splits(test=None)
    inputs = replace(inputs, data=data, load_plain=lambda: plain)
    if data.val is None or not len(data.val):
        raise DataError(
            "a choice is made on validation data",
            where=data.name,
            found="none",
            fix="draw some: with_validation(data)",
        )
    given = CANDIDATES if candidates is None else candidates
    asked = candidates is not None or budget.seconds is not None
    candidates = [each for each in given if asked or not each.on_request]
    identity = {
        "train": len(data.train),
        "val": len(data.val),
        **describe_data(data.train, data.val, data.collate, log),
        "the backbone": describe_host(inputs.host),
        "settings": settings.identity(),
        "budget": asdict(budget),
        "options": dict(inputs.options),
        "candidates": [each.to_dict() for each in candidates],
        # Constants of this version: with others a choice that goes on would end elsewhere.
        "more": MORE,
        "shrink": SHRINK,
        # Last, for it may be long.
        "the class names": describe_classes(data.labels),
    }
    folder = ChoiceFolder(out, identity, resume)
    trials = Trials(inputs, tested, settings, budget, folder, log, candidates, beside)
    rows: list[Row] = []
    for candidate in candidates:
        # The rows before say what is to be beaten, and how much of the budget is gone.
        rows.append(trials.row(candidate, rows))
    rows += [_leave_out(each, settings) for each in given if each not in candidates]
    winner = rule.choose(rows)
    if winner is None:
        raise TrainingError(
            "no method can be chosen",
            where=data.name,
            found="; ".join(f"{row['method']}: {row['why']}" for row in rows),
            fix="raise the budget of memory or time, take a smaller batch or a smaller backbone, or name "
            "a method",
        )
    explained = [
        row if row["status"] == "left out" else {**row, "why": rule.explain(row, winner)}
        for row in rows
    ]
    start = None
    if winner["goes_on"]:
        ended = folder.weights(winner["method"], winner["lr"])
        # Whole numbers are counters, not weights.
        start = {n: v * SHRINK if v.is_floating_point() else v for n, v in ended.items()}
    # Last, when all is read: until here a choice that is killed may need any of them again.
    folder.remove_others(winner["method"], winner["lr"])
    return Choice(
        winner["method"],
        winner["lr"],
        winner["epochs"],
        winner["accumulate"],
        winner["form"],
        explained,
        len(data.val),
        budget,
        start,
    )


def _leave_out(candidate: Candidate, settings: FitSettings) -> Row:
    """The row of a method that nobody asked for."""
    return {
        "method": candidate.method,
        "status": "left out",
        "why": NOT_ASKED,
        "epochs": candidate.epochs(settings.epochs),
        "goes_on": candidate.warm_start,
        "trial_epochs": candidate.trial_epochs(settings.epochs),
        "seconds": 0.0,
        "cpu_seconds": 0.0,
    }
