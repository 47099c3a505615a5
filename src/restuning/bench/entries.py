"""Columns of a grid, checked before a run is made: a grid may run for days."""

from __future__ import annotations

from collections.abc import Iterable

from restuning import methods
from restuning._errors import TrainingError
from restuning.bench import rivals
from restuning.bench.grid import Entry, GridProtocol, GridRun
from restuning.search import AUTO, Budget

AUTO_OPTIONS = ("memory", "minutes")
"""Options of `auto`."""


def check_entries(protocol: GridProtocol, runs: Iterable[GridRun]) -> None:
    """Refuse methods, options and settings that no run could be made with, whatever the backbone.

    Raises:
        UnknownNameError: No such method, option or value, or a method has no use for an option of its own.
        TrainingError: Settings that cannot be trained with, or that `auto` does not take.
        ForecastError: Not an amount of memory.
    """
    for entry in {run.entry.label: run.entry for run in runs}.values():
        if entry.method == AUTO:
            read_budget(protocol, entry)
            continue
        for setting in protocol.candidates(entry):
            options = protocol.options_for(entry, setting)
            protocol.settings_for(setting, seed=0)
            if entry.method in rivals.RIVALS:
                rivals.check(entry.method, options)
            else:
                methods.check(entry.method, (AUTO, *rivals.RIVALS), options)
        if entry.method not in rivals.RIVALS:
            methods.refuse_unused([entry.method], dict(entry.options))


def read_budget(protocol: GridProtocol, entry: Entry) -> Budget:
    """The budget of an entry whose method is `auto`.

    Raises:
        TrainingError: An option it does not take, or a grid that stores no features.
        ForecastError: Not an amount of memory.
    """
    options = dict(entry.options)
    if unknown := options.keys() - set(AUTO_OPTIONS):
        raise TrainingError(
            "no such option",
            where=f"{AUTO}: {', '.join(sorted(unknown))}",
            fix=f"{AUTO} takes {' and '.join(AUTO_OPTIONS)}",
        )
    memory, minutes = options.get("memory"), options.get("minutes")
    if minutes is not None and not isinstance(minutes, int | float):
        raise TrainingError(
            "not a budget of time",
            where="minutes",
            found=str(minutes),
            fix="write e.g. auto:minutes=10",
        )
    if not protocol.cache:
        raise TrainingError(
            "auto trains from stored features first",
            where="--no-cache",
            fix="leave it out, or name methods",
        )
    return Budget.of(None if memory is None else str(memory), minutes)


def is_detached(entry: Entry) -> bool:
    """Whether an entry is trained beside the backbone; `auto` may be, which tries such methods."""
    if entry.method in rivals.RIVALS:
        return not rivals.RIVALS[entry.method].inside
    return entry.method == AUTO or not methods.runs_inside(entry.method)
