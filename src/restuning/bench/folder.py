"""The description of a grid, which all commands on its folder must agree with."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from restuning._errors import FormatError, TrainingError, warn
from restuning._files import Claim, read_json, refuse_other, write_json, write_text
from restuning.bench.entries import check_entries
from restuning.bench.grid import GridProtocol, GridRun, slug
from restuning.bench.measure import read_versions
from restuning.training import FitSettings


def open_grid(
    folder: Path, protocol: GridProtocol, runs: Sequence[GridRun], retry: bool = False
) -> list[GridRun]:
    """Begin a grid or go on with one; the runs that have no result.

    Args:
        folder: Of the grid.
        protocol: Must be the one the folder was begun with.
        runs: Wanted; more tasks, entries and seeds may be added to a folder at any time.
        retry: Forget failures, so that those runs are made again.

    Raises:
        TrainingError: The folder was begun with another protocol, or runs cannot be made so; see
            `check_entries`.
        UnknownNameError: The same, of methods and their options.
        FormatError: A result that is there is malformed.
    """
    check_entries(protocol, runs)
    # Through JSON, to compare like with like: tuples come back as lists.
    identity = json.loads(json.dumps(protocol.identity()))
    # By label and not in the identity: entries may be added to a grid later.
    choices = {r.entry.label: _list_choices(protocol, r) for r in runs}
    file = folder / GRID
    try:
        # Grids are kept in repositories; what may be deleted does not belong there.
        write_text(folder / WORK / ".gitignore", "*\n")
    except OSError as error:
        raise FormatError(
            "the folder of a grid cannot be written",
            where=str(folder / WORK),
            found=error.strerror or str(error),
            fix="look at what lies there, or give another --out",
        ) from None
    # Two commands that begin one folder at once must agree on its description.
    claim = Claim.take(folder / WORK / "grid.lock", wait=True)
    try:
        known_choices: dict[str, Any] = {}
        if file.exists():
            written = read_grid(folder)
            what = "this folder holds a grid of another protocol"
            fix = "use that of then, or another --out"
            refuse_other(written["protocol"], identity, folder, what=what, fix=fix)
            known_choices = written["choices"]
            changed = [
                k for k, v in choices.items() if k in known_choices and known_choices[k] != v
            ]
            if changed:
                before = [k for k in changed if _is_of_before(known_choices[k], choices[k])]
                if before:
                    raise TrainingError(
                        "results of this grid are of what a method was before",
                        where=str(folder),
                        found=f"{before[0]}: the method lora, which was PEFT's own and is ours since",
                        fix="use --methods peft-lora, which is PEFT's, or another --out",
                    )
                raise TrainingError(
                    "this grid chooses between other settings",
                    where=str(folder),
                    found="; ".join(
                        f"{k}: {known_choices[k]} then, {choices[k]} now" for k in changed
                    ),
                    fix="use those of then, another label (LABEL=METHOD), or another --out",
                )
        write_json(
            file,
            {
                "format": FORMAT,
                "protocol": identity,
                "choices": {**known_choices, **choices},
                "versions": read_versions(),
            },
            sealed=True,
        )
    finally:
        if claim is not None:
            claim.give_back()
    unfinished = []
    for run in runs:
        result = result_file(folder, run)
        # Read even where it is not retried: what is malformed is refused now, not in a report.
        there = result.exists() and read_run(folder, run, protocol)["status"]
        if there == "failed" and retry:
            result.unlink()
        if not result.exists():
            unfinished.append(run)
    return unfinished


def refuse_other_source(folder: Path, name: str, value: str, of_task: str = "") -> None:
    """Refuse to put results of other data, or of another backbone, beside those that are there.

    Args:
        folder: Of the grid.
        name: What is compared, as the error calls it.
        value: What it is known by.
        of_task: The task that it concerns; "" for all.

    Raises:
        TrainingError: It is another one than results of this folder were made with.
    """
    file = folder / SOURCES
    claim = Claim.take(folder / WORK / "grid.lock", wait=True)
    try:
        known = read_json(file) if file.exists() else {}
        if name not in known:
            if any((folder / RUNS / of_task).rglob("*.json")):
                warn(
                    "results of an earlier version do not say what they were made of",
                    where=str(folder / RUNS / of_task),
                    found=f"nothing of {name}",
                    fix="if data or weights have changed since, give another --out",
                )
            write_json(file, {**known, name: value})
            return
    finally:
        if claim is not None:
            claim.give_back()
    what, fix = "this folder holds results of something else", "give another --out"
    refuse_other({name: known[name]}, {name: value}, folder, what=what, fix=fix)


def _list_choices(protocol: GridProtocol, run: GridRun) -> list[dict[str, Any]]:
    method = {"options": dict(run.entry.options), "method": run.entry.method}
    if run.entry.method in REVISIONS:
        method[REVISION] = REVISIONS[run.entry.method]
    choices = [{**dict(setting), **method} for setting in protocol.candidates(run.entry)]
    return json.loads(json.dumps(choices))


def _is_of_before(then: Any, now: Sequence[Mapping[str, Any]]) -> bool:
    """Whether choices differ in nothing but a method's revision."""
    plain = [{name: value for name, value in each.items() if name != REVISION} for each in now]
    return any(REVISION in each for each in now) and then == plain


def read_grid(folder: Path) -> dict[str, Any]:
    """What a grid says of itself: its protocol, and what is chosen between by label.

    Raises:
        FormatError: No grid is there, or its description is malformed.
    """
    if not os.path.lexists(folder / GRID):
        raise FormatError(
            "no grid here",
            where=str(folder),
            found=f"no {GRID}",
            fix="give the folder that `restuning bench run` left",
        )
    content = read_json(folder / GRID, what="the description of a grid")
    wanted = {"protocol": dict, "choices": dict, "versions": dict}
    wrong = [k for k, kind in wanted.items() if not isinstance(content.get(k, {}), kind)]
    if content.get("format") != FORMAT or "protocol" not in content or wrong:
        raise FormatError(
            "the description of a grid is malformed",
            where=str(folder / GRID),
            found=", ".join(wrong),
            fix="restore it, or give another --out",
        )
    return {"choices": {}, **content}


def read_protocol(
    folder: Path, weights: Path | None = None, backbone: str | None = None
) -> GridProtocol:
    """The protocol a grid was run under, to load its backbone and tasks again.

    Args:
        folder: Of the grid.
        weights: File of the backbone's weights, which may lie elsewhere here.
        backbone: The grid's own, said by the user, who then trusts it; None for what the grid names,
            of which nothing is fetched or executed.

    Raises:
        FormatError: No grid is there, or its description is malformed.
        TrainingError: The grid was run on another backbone.
    """
    try:
        fields = dict(read_grid(folder)["protocol"])
        # The seed is each run's own and not in the file.
        settings = FitSettings(**{**fields.pop("settings"), "seed": 0})
        fields.pop("choices")
        kinds = {"backbone": str, "cache": bool, "dtype": str}
        if wrong := [k for k, kind in kinds.items() if not isinstance(fields.get(k), kind)]:
            raise TypeError(", ".join(wrong))
        told = {
            "weights": str(weights) if weights else None,
            "settings": settings,
            "named_in": str(folder / GRID) if backbone is None else None,
        }
        protocol = GridProtocol(**{**fields, **told})
    except (KeyError, TypeError, ValueError, TrainingError) as error:
        raise FormatError(
            "the description of a grid is malformed",
            where=str(folder / GRID),
            found=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            fix="restore it, or run the grid again",
        ) from None
    if backbone not in (None, protocol.backbone):
        raise TrainingError(
            "this grid was run on another backbone",
            where=str(folder),
            found=f"{protocol.backbone} then, {backbone} now",
            fix="leave it out, or give that of then",
        )
    return protocol


def describe_run(run: GridRun, protocol: GridProtocol) -> dict[str, Any]:
    """The fields that every result starts with, failed or done."""
    return {
        "format": FORMAT,
        "task": run.task.name,
        "group": run.task.group,
        "label": run.entry.label,
        "method": run.entry.method,
        "stage": run.stage,
        "seed": run.seed,
        NAME: run.name,
        MARK: _mark(json.loads(json.dumps(protocol.identity()))),
    }


def result_file(folder: Path, run: GridRun) -> Path:
    """The file that a run's result is in or will be in."""
    return folder / RUNS / f"{run.name}.json"


def task_folder(folder: Path, run: GridRun) -> Path:
    """Where the task of a final run is saved, and stays with `--keep`."""
    return folder / WORK / "tasks" / f"{slug(run.name.replace('/', '.'))}.task"


FORMAT = 1
"""Raised when a reader of today could not read what is written tomorrow."""

REVISION = "revision"
REVISIONS = {"lora": 2}
"""Methods whose name meant something else in earlier grids: `lora` was PEFT's, which is `peft-lora` now."""

GRID = "grid.json"
NAME = "run"
MARK = "protocol digest"
RUNS = "runs"
SOURCES = "sources.json"
"""What the backbone and the data of each task were known by when the first result was made of them."""
WORK = "work"
"""Folder of what may be deleted at any time: checkpoints, decoded images, features."""

_NEEDED: dict[str, type | tuple[type, ...]] = {
    "status": str,
    "task": str,
    "label": str,
    "method": str,
    "stage": str,
    "seed": int,
}
_NEEDED_DONE: dict[str, type | tuple[type, ...]] = {
    "accuracy": (int, float),
    "count": int,
    "hits": str,
    "parameters": dict,
    "memory": dict,
    "seconds": dict,
    "settings": dict,
    "data": dict,
    "versions": dict,
    "hardware": dict,
}


def read_result(file: Path) -> dict[str, Any]:
    """A run's result, checked field by field.

    Raises:
        FormatError: Malformed, incomplete, of another format, or a number is out of its range.
    """
    content = read_json(file)
    if NAME in content:
        # Who writes a name seals as well: without a seal it was taken off.
        read_json(file, sealed=True)
    if content.get("format") != FORMAT:
        raise FormatError(
            "a result of another format",
            where=str(file),
            found=f"format {content.get('format')!r}, we read {FORMAT}",
            fix="read it with the library that wrote it",
        )
    done = content.get("status") == "done"
    needed = {**_NEEDED, **(_NEEDED_DONE if done else {"error": str})}
    wrong = [k for k, kind in needed.items() if not _is(content.get(k), kind)]
    if not isinstance(content.get("group", ""), str):
        wrong.append("group")
    if not wrong and content["status"] == "done":
        value = content["accuracy"]
        if not (math.isfinite(value) and 0 <= value <= 1):
            wrong = ["accuracy"]
        # Two figures in one file that must agree: one that was edited by hand is noticed.
        elif abs(unpack_hits(content["hits"], content["count"], file).mean() - value) > 1e-9:
            wrong = ["accuracy (it is not the mean of hits)"]
    if wrong:
        raise FormatError(
            "a result is incomplete or malformed",
            where=str(file),
            found=", ".join(wrong),
            fix="restore it, or delete it and run the grid again",
        )
    return content


def _is(value: Any, kind: type | tuple[type, ...]) -> bool:
    # True is an int to Python, and no seed or count to us.
    return isinstance(value, kind) and not isinstance(value, bool)


def read_run(folder: Path, run: GridRun, protocol: GridProtocol) -> dict[str, Any]:
    """The result of a run, which must be its own.

    Raises:
        FormatError: As `read_result`, or it is that of another run or of another protocol.
    """
    file = result_file(folder, run)
    result = read_result(file)
    wanted = describe_run(run, protocol)
    own = ("task", "label", "stage", "seed", NAME, MARK)
    _refuse_another(file, result, {name: wanted[name] for name in own})
    return result


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All results of a grid, ordered by path.

    Raises:
        FormatError: No grid is there, or a result is malformed or lies where another belongs.
    """
    mark = _mark(read_grid(folder)["protocol"])
    results = []
    for file in sorted((folder / RUNS).rglob("*.json")):
        result = read_result(file)
        name = file.relative_to(folder / RUNS).as_posix().removesuffix(".json")
        _refuse_another(file, result, {NAME: name, MARK: mark})
        results.append(result)
    return results


def _refuse_another(file: Path, result: dict[str, Any], wanted: dict[str, Any]) -> None:
    # Results of before there were a name and a mark have none.
    known = {NAME: wanted[NAME], MARK: wanted[MARK], **result}
    other = [k for k, v in wanted.items() if known.get(k) != v]
    if other:
        raise FormatError(
            "a result lies where that of another run belongs",
            where=str(file),
            found=f"another {', '.join(other)}",
            fix="restore it, or delete it and run the grid again",
        )


def _mark(protocol: Mapping[str, Any]) -> str:
    """Tells grids of different protocols apart."""
    return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:16]


def pack_hits(hits: Sequence[bool] | np.ndarray) -> str:
    """Pack which answers are right, in the order of the test split: a bit each, as base64."""
    return base64.b64encode(np.packbits(np.asarray(hits, bool)).tobytes()).decode()


def unpack_hits(text: str, count: int, where: Path | str = "") -> np.ndarray:
    """Unpack what `pack_hits` packed.

    Raises:
        FormatError: Not base64, or of another length.
    """
    try:
        bits = np.unpackbits(np.frombuffer(base64.b64decode(text, validate=True), np.uint8))
        # Bits come in bytes, so up to seven more than examples.
        if count < 1 or not count <= len(bits) < count + 8:
            raise ValueError(f"{len(bits)} bits for {count} examples")
    except ValueError as error:
        raise FormatError(
            "the right answers of a result are malformed",
            where=str(where),
            found=str(error),
            fix="restore it, or delete it and run the grid again",
        ) from None
    return bits[:count].astype(bool)
