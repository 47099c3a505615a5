"""What a final run was chosen to be on validation: a setting of its method, or by `auto` a method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from restuning._errors import TrainingError
from restuning.bench.entries import read_budget
from restuning.bench.folder import read_run
from restuning.bench.grid import Entry, GridProtocol, GridRun, Setting, search_runs
from restuning.search import Choice, choose_method
from restuning.training.run import Inputs


def find_setting(
    protocol: GridProtocol, folder: Path, run: GridRun
) -> tuple[Setting, dict[str, Any] | None]:
    """The setting of a run; of a final one, the best of its searches on validation.

    Raises:
        TrainingError: All its searches failed.
    """
    if run.stage == "search":
        return run.setting, None
    runs = search_runs(protocol, run.task, run.entry)
    # Only one candidate: it needs no search.
    if not runs:
        return protocol.candidates(run.entry)[0], None
    scores = []
    for search in runs:
        result = read_run(folder, search, protocol)
        if result["status"] == "done":
            scores.append((result["accuracy"], search.setting))
    if not scores:
        raise TrainingError(
            "no setting survived",
            where=str(run),
            found=f"{len(runs)} searches failed",
            fix="read their results; lower the learning rates, or --retry",
        )
    # The first of equals: what stands first in the choices.
    best = max(scores, key=lambda each: each[0])
    return best[1], {
        "validation_accuracy": best[0],
        "failed": len(runs) - len(scores),
        "among": [{**dict(setting), "validation_accuracy": value} for value, setting in scores],
    }


def choose_entry(
    run: GridRun, protocol: GridProtocol, inputs: Inputs, folder: Path
) -> tuple[Entry, Choice]:
    """The method that a run of `auto` trains, in place of its own, and how it was chosen.

    The epochs of the protocol are those of a method inside the backbone.

    Args:
        run: Of an entry whose method is `auto`.
        protocol: Of the grid.
        inputs: The task's data before the backbone.
        folder: Of the choice.

    Raises:
        TrainingError: An option it does not take, or settings to choose from, which it chooses itself.
        ForecastError: Not an amount of memory.
    """
    # Each seed chooses anew: a table tells how sure the choice is, too.
    settings = protocol.settings_for((), run.seed)
    budget = read_budget(protocol, run.entry)
    choice = choose_method(inputs, settings, folder, budget=budget)
    # The label stays, so the grid's tables have a column for `auto` itself.
    return Entry(run.entry.label, choice.method), choice


def describe_choice(choice: Choice) -> tuple[dict[str, Any], dict[str, Any]]:
    """The setting that was chosen, and what it was chosen among, as results tell them."""
    setting = {
        "method": choice.method,
        "lr": choice.lr,
        "epochs": choice.epochs,
        "goes_on": choice.start is not None,
    }
    scores = [r["val_accuracy"] for r in choice.rows if r["method"] == choice.method]
    out = [row["method"] for row in choice.rows if row["status"] == "left out"]
    return setting, {"validation_accuracy": scores[0], "failed": len(out), **choice.to_dict()}
