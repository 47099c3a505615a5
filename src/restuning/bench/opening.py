"""The description of a grid, which all commands on its folder must agree with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from restuning._errors import FormatError, TrainingError
from restuning.bench.facts import result_file
from restuning.bench.grid import Protocol, Run
from restuning.bench.measure import versions
from restuning.bench.record import FORMAT, GRID, WORK, read_json, read_result, write_json
from restuning.features.claim import Claim
from restuning.train import FitSettings


def open_grid(
    folder: Path, protocol: Protocol, runs: Sequence[Run], retry: bool = False
) -> list[Run]:
    """Begin a grid or go on with one; the runs that have no result.

    Args:
        folder: Of the grid.
        protocol: Must be the one the folder was begun with.
        runs: Wanted; more tasks, entries and seeds may be added to a folder at any time.
        retry: Forget failures, so that those runs are made again.

    Raises:
        TrainingError: The folder was begun with another protocol.
        FormatError: A result that is there is malformed.
    """
    identity = json.loads(json.dumps(protocol.identity()))
    choices = {r.entry.label: _choices(protocol, r) for r in runs}
    file = folder / GRID
    (folder / WORK).mkdir(parents=True, exist_ok=True)
    (folder / WORK / ".gitignore").write_text("*\n", encoding="utf-8")
    claim = Claim.take(folder / WORK / "grid.lock", wait=True)
    try:
        known: dict[str, Any] = {}
        if file.exists():
            before = read_json(file)
            _check_same(before, identity, folder)
            known = before.get("choices", {})
            other = [k for k, v in choices.items() if k in known and known[k] != v]
            if other:
                raise TrainingError(
                    "this grid chooses between other settings", where=str(folder),
                    found="; ".join(f"{k}: {known[k]} then, {choices[k]} now" for k in other),
                    fix="use those of then, another label (LABEL=METHOD), or another --out",
                )  # fmt: skip
        write_json(file, {"format": FORMAT, "protocol": identity, "choices": {**known, **choices},
                          "versions": versions()})  # fmt: skip
    finally:
        if claim is not None:
            claim.give_back()
    left = []
    for run in runs:
        result = result_file(folder, run)
        if result.exists() and read_result(result)["status"] == "failed" and retry:
            result.unlink()
        if not result.exists():
            left.append(run)
    return left


def _choices(protocol: Protocol, run: Run) -> list[dict[str, Any]]:
    found = [dict(setting) for setting in protocol.candidates(run.entry)]
    return json.loads(json.dumps([{**found_, "options": dict(run.entry.options),
                                   "method": run.entry.method} for found_ in found]))  # fmt: skip


def _check_same(before: dict[str, Any], identity: dict[str, Any], folder: Path) -> None:
    then = before.get("protocol")
    if not isinstance(then, dict) or before.get("format") != FORMAT:
        raise FormatError("the description of a grid is malformed", where=str(folder / GRID),
                          fix="restore it, or give another --out")  # fmt: skip
    names = [k for k in identity if then.get(k) != identity[k]]
    if not names:
        return
    told = []
    for name in names:
        old, new = then.get(name), identity[name]
        if isinstance(old, dict) and isinstance(new, dict):
            told += [
                f"{k} {old.get(k)!r} then, {v!r} now" for k, v in new.items() if old.get(k) != v
            ]
        else:
            told.append(f"{name} {old!r} then, {new!r} now")
    raise TrainingError(
        "this folder holds a grid of another protocol", where=str(folder),
        found="; ".join(told), fix="use the protocol of then, or another --out",
    )  # fmt: skip


def protocol_of(folder: Path, weights: Path | None = None) -> Protocol:
    """The protocol a grid was run under, to load its backbone and tasks again.

    Args:
        folder: Of the grid.
        weights: File of the backbone's weights, which may lie elsewhere here.

    Raises:
        FormatError: No grid is there, or its description is malformed.
    """
    try:
        found = dict(read_json(folder / GRID)["protocol"])
        settings = FitSettings(**{**found.pop("settings"), "seed": 0})
        found.pop("choices")
        return Protocol(**{**found, "weights": str(weights) if weights else None,
                           "settings": settings})  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(
            "the description of a grid is malformed", where=str(folder / GRID),
            found=f"{type(error).__name__}: {error}", fix="restore it, or run the grid again",
        ) from None  # fmt: skip
