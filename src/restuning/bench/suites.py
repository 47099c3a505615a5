"""Suites of tasks: known lists of names, and any folder of tasks in the same layout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from restuning._errors import DataError, UnknownNameError

LISTS = ("train800.txt", "val200.txt", "test.txt")
"""What makes a folder a task: the community's VTAB-1K lists (lines `images/xxx.jpg label`)."""


@dataclass(frozen=True)
class SuiteTask:
    """One task of a suite.

    Attributes:
        name: Of its folder, and in tables.
        group: "natural", "specialized", "structured", "fine-grained" or "" where it is not told.
        source: What `load_data` takes: a folder, or a name such as `digits`.
    """

    name: str
    group: str
    source: str


def find_tasks(where: str, chosen: Sequence[str] = ()) -> list[SuiteTask]:
    """The tasks of a folder, or a single data set by its name.

    Args:
        where: A folder of task folders, one task folder, or a data set's name (`digits`,
            `torchvision:CIFAR100`, ...).
        chosen: Names to keep, in this order; empty for all.

    Raises:
        DataError: No task is there.
        UnknownNameError: A chosen task is not there.
    """
    root = Path(where).expanduser()
    if not root.is_dir():
        if "/" in where or not where:
            raise DataError("no such folder of tasks", where=where, fix="give its path")
        return [SuiteTask(where.rpartition(":")[2].lower(), "", where)]
    folders = [root] if is_task(root) else sorted(p for p in root.iterdir() if is_task(p))
    if not folders:
        raise DataError(
            "no task in this folder", where=where, found=f"none with {' and '.join(LISTS)}",
            fix="lay tasks out as NAME/train800.txt, val200.txt, test.txt and images/ "
            "(docs/bench.md)",
        )  # fmt: skip
    found = {p.name: SuiteTask(p.name, _group(p), str(p)) for p in folders}
    for name in chosen:
        if name not in found:
            near = get_close_matches(name, found, n=3)
            raise UnknownNameError(
                "no such task", where=name, found=f"did you mean {', '.join(near)}?" if near else "",
                fix=f"one of: {', '.join(found)}",
            )  # fmt: skip
    return [found[name] for name in chosen] if chosen else list(found.values())


def is_task(folder: Path) -> bool:
    """Whether a folder holds the lists of a task."""
    return folder.is_dir() and all((folder / name).is_file() for name in LISTS)


def _group(folder: Path) -> str:
    """As `task.json` tells, where there is one."""
    described = folder / "task.json"
    if not described.exists():
        return ""
    try:
        return str(json.loads(described.read_text(encoding="utf-8")).get("group", ""))
    except (ValueError, AttributeError, UnicodeDecodeError) as error:
        raise DataError(
            "task.json of a data set is malformed", where=str(described), found=str(error)[:200],
            fix='it is one object with "group" and "classes"',
        ) from None  # fmt: skip
