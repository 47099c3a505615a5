"""What a suite on disk lacks, and a digest of what it has."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from restuning._errors import DataError, UnknownNameError
from restuning.bench.suites import LISTS, SUITES, Member, find_tasks
from restuning.data import read_list

SIZES = {"train800.txt": 800, "val200.txt": 200}
"""Lines of VTAB-1K's lists."""


@dataclass(frozen=True)
class CheckedTask:
    """One task of a suite.

    Attributes:
        task: Its name.
        problems: What is wrong, in words; empty where nothing is.
        sizes: Examples by list.
        digest: sha256 of the names, labels and sizes of all images, 16 hexadecimal digits: machines
            with other digests have other tasks. It says nothing of what images of equal size show.
            "" where lists are missing.
    """

    task: str
    problems: tuple[str, ...]
    sizes: Mapping[str, int]
    digest: str

    def row(self) -> dict[str, Any]:
        """The checked task as a JSON object."""
        return {
            "task": self.task,
            "problems": list(self.problems),
            "sizes": dict(self.sizes),
            "digest": self.digest,
        }


def check_suite(suite: str, root: Path) -> list[CheckedTask]:
    """Every task of a suite: lists, numbers of examples and classes, and images that are not there.

    Args:
        suite: "vtab-1k", "fgvc", or "shared" for any folder of tasks.
        root: Its folder.

    Raises:
        UnknownNameError: No such suite.
        DataError: The folder is not there.
    """
    if suite not in (*SUITES, "shared") or suite == "cifar100":
        raise UnknownNameError(
            "no suite that can be checked", where=suite, fix="one of: vtab-1k, fgvc, shared"
        )
    if not root.is_dir():
        raise DataError("no such folder", where=str(root), fix="give the suite's folder")
    if suite == "shared":
        return [_check(root / task.name, None, suite) for task in find_tasks(str(root))]
    return [_check(root / name, member, suite) for name, member in SUITES[suite].items()]


def _check(folder: Path, member: Member | None, suite: str) -> CheckedTask:
    if not folder.is_dir():
        return CheckedTask(folder.name, ("no such folder",), {}, "")
    if suite == "fgvc" and (folder / "train").is_dir():
        return _check_class_folders(folder, member)
    problems, sizes, samples = [], {}, []
    # The fourth is what final trainings of the papers read: train and val in one list.
    for name in (*LISTS, "train800val200.txt"):
        if not (folder / name).is_file():
            problems.append(f"{name} is missing")
            continue
        try:
            listed = read_list(folder / name)
        except DataError as error:
            problems.append(f"{name}: {error.what}, {error.found}")
            continue
        sizes[name] = len(listed)
        samples += listed
        absent = [path for path, _ in listed if not path.is_file()]
        if absent:
            problems.append(
                f"{name}: {len(absent)} of {len(listed)} images are missing, first "
                f"{absent[0].relative_to(folder)}"
            )
        if suite == "vtab-1k" and SIZES.get(name, len(listed)) != len(listed):
            problems.append(f"{name}: {len(listed)} lines instead of {SIZES[name]}")
    problems += _compare_with(member, sizes.get("test.txt"), {label for _, label in samples})
    return CheckedTask(folder.name, tuple(problems), sizes, _digest(folder, samples))


def _compare_with(member: Member | None, test: int | None, labels: set[int]) -> list[str]:
    if member is None:
        return []
    problems = []
    if test is not None and test != member.test:
        problems.append(f"{test} test images, published are {member.test}")
    if labels and max(labels) >= member.classes:
        problems.append(f"label {max(labels)}, but {member.classes} classes (labels from 0)")
    # Fewer is not wrong by itself, but a copy that lost a class looks just so.
    elif labels and len(labels) < member.classes:
        problems.append(f"{len(labels)} of {member.classes} classes occur")
    return problems


def _check_class_folders(folder: Path, member: Member | None) -> CheckedTask:
    problems, sizes, names = [], {}, []
    for split in ("train", "val", "test"):
        files = [p for p in sorted((folder / split).rglob("*")) if p.is_file()]
        sizes[split] = len(files)
        # The folder's name tells the class; the digest has it in the path.
        names += [(file, 0) for file in files]
        if not files:
            problems.append(f"{split}/ is missing or empty")
    classes = [p.name for p in (folder / "train").iterdir() if p.is_dir()]
    problems += _compare_with(member, sizes["test"] or None, set(range(len(classes))))
    return CheckedTask(folder.name, tuple(problems), sizes, _digest(folder, names))


def _digest(folder: Path, samples: list[tuple[Path, int]]) -> str:
    if not samples:
        return ""
    digest = hashlib.sha256()
    for path, label in samples:
        # Sizes and no contents: a suite has hundreds of thousands of images.
        size = path.stat().st_size if path.is_file() else -1
        digest.update(f"{path.relative_to(folder)}\t{label}\t{size}\n".encode())
    return digest.hexdigest()[:16]
