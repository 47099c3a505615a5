"""Results on disk: one JSON for each run, written whole or not at all, checked when read."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from restuning._errors import FormatError
from restuning.train.records import read_json as read_json
from restuning.train.records import write_json as write_json

FORMAT = 1
"""Raised when a reader of today could not read what is written tomorrow."""

GRID = "grid.json"
RUNS = "runs"
WORK = "work"
"""Folder of what may be deleted at any time: checkpoints, decoded images, features."""

_NEEDED: dict[str, type | tuple[type, ...]] = {
    "status": str, "task": str, "label": str, "method": str, "stage": str, "seed": int,
}  # fmt: skip
_NEEDED_DONE: dict[str, type | tuple[type, ...]] = {
    "accuracy": (int, float), "count": int, "hits": str, "parameters": dict, "memory": dict,
    "seconds": dict, "settings": dict, "data": dict, "versions": dict, "hardware": dict,
}  # fmt: skip


def read_result(file: Path) -> dict[str, Any]:
    """A run's result, checked field by field.

    Raises:
        FormatError: Malformed, incomplete, of another format, or a number is out of its range.
    """
    content = read_json(file)
    if content.get("format") != FORMAT:
        raise FormatError(
            "a result of another format", where=str(file),
            found=f"format {content.get('format')!r}, we read {FORMAT}",
            fix="read it with the library that wrote it",
        )  # fmt: skip
    needed = {**_NEEDED, **(_NEEDED_DONE if content.get("status") == "done" else {})}
    wrong = [k for k, kind in needed.items() if not _is(content.get(k), kind)]
    if not wrong and content["status"] == "done":
        value = content["accuracy"]
        if not (math.isfinite(value) and 0 <= value <= 1):
            wrong = ["accuracy"]
        elif abs(unpacked(content["hits"], content["count"], file).mean() - value) > 1e-9:
            wrong = ["accuracy (it is not the mean of hits)"]
    if wrong:
        raise FormatError(
            "a result is incomplete or malformed", where=str(file), found=", ".join(wrong),
            fix="restore it, or delete it and run the grid again",
        )  # fmt: skip
    return content


def _is(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All results of a grid, ordered by path.

    Raises:
        FormatError: No grid is there, or a result is malformed.
    """
    if not (folder / GRID).exists():
        raise FormatError(
            "no grid here", where=str(folder), found=f"no {GRID}",
            fix="give the folder that `restuning bench run` left",
        )  # fmt: skip
    return [read_result(file) for file in sorted((folder / RUNS).rglob("*.json"))]


def packed(hits: Sequence[bool] | np.ndarray) -> str:
    """Right answers in the order of the test split, a bit each, as base64."""
    return base64.b64encode(np.packbits(np.asarray(hits, bool)).tobytes()).decode()


def unpacked(text: str, count: int, where: Path | str = "") -> np.ndarray:
    """What `packed` packed.

    Raises:
        FormatError: Not base64, or of another length.
    """
    try:
        bits = np.unpackbits(np.frombuffer(base64.b64decode(text, validate=True), np.uint8))
        if count < 1 or not count <= len(bits) < count + 8:
            raise ValueError(f"{len(bits)} bits for {count} examples")
    except ValueError as error:
        raise FormatError(
            "the right answers of a result are malformed", where=str(where), found=str(error),
            fix="restore it, or delete it and run the grid again",
        ) from None  # fmt: skip
    return bits[:count].astype(bool)
