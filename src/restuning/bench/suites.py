"""Suites of tasks: three known ones, and any folder of tasks in the same layouts."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from restuning._errors import DataError, FormatError, UnknownNameError
from restuning._files import expand_home, read_json
from restuning.data import DataOptions, may_be_data
from restuning.data.data import name_of
from restuning.data.hub_sets import is_hub_set, name_hub_set
from restuning.data.splits import SPLIT_NAMES, find_splits
from restuning.data.texts import PARQUET, TABLES
from restuning.problems import SingleLabel

LISTS = ("train800.txt", "val200.txt", "test.txt")
"""What makes a folder a task: the community's VTAB-1K lists (lines `images/xxx.jpg label`)."""

PLACE = "RESTUNING_DATA"
"""Environment variable with the folder that suites lie in."""


@dataclass(frozen=True)
class SuiteTask:
    """One task of a suite.

    Attributes:
        name: Of its folder, and in tables.
        group: "natural", "specialized", "structured", "fine-grained" or "" where it is not told.
        source: What `load_data` takes: a folder, a table, or a name such as `digits`.
        label, image: Of a table its column of classes and that of images; None of other data, and where the column
            of images is found by its name.
    """

    name: str
    group: str
    source: str
    label: str | None = None
    image: str | None = None

    @property
    def options(self) -> DataOptions:
        """How `load_data` reads it."""
        if self.label is None:
            return DataOptions()
        return DataOptions(label=self.label, problem=SingleLabel.kind, image=self.image)


@dataclass(frozen=True)
class Member:
    """A task that a suite must have: its group, classes, and test images."""

    group: str
    classes: int
    test: int


_N, _SP, _ST, _F = "natural", "specialized", "structured", "fine-grained"

# Names of folders: the community's archive (NOAH, FacT, Convpass). Sizes of test splits: Zhai et al.
# 2019, arXiv 1910.04867, Table 2; of FGVC: Jia et al. 2022, arXiv 2203.12119, Table 6.
SUITES: dict[str, dict[str, Member]] = {
    "vtab-1k": {
        "cifar": Member(_N, 100, 10_000),
        "caltech101": Member(_N, 102, 6_084),
        "dtd": Member(_N, 47, 1_880),
        "oxford_flowers102": Member(_N, 102, 6_149),
        "oxford_iiit_pet": Member(_N, 37, 3_669),
        "svhn": Member(_N, 10, 26_032),
        "sun397": Member(_N, 397, 21_750),
        "patch_camelyon": Member(_SP, 2, 32_768),
        "eurosat": Member(_SP, 10, 5_400),
        "resisc45": Member(_SP, 45, 6_300),
        "diabetic_retinopathy": Member(_SP, 5, 42_670),
        "clevr_count": Member(_ST, 8, 15_000),
        "clevr_dist": Member(_ST, 6, 15_000),
        "dmlab": Member(_ST, 6, 22_735),
        "kitti": Member(_ST, 4, 711),
        "dsprites_loc": Member(_ST, 16, 73_728),
        "dsprites_ori": Member(_ST, 16, 73_728),
        "smallnorb_azi": Member(_ST, 18, 12_150),
        "smallnorb_ele": Member(_ST, 9, 12_150),
    },
    "fgvc": {
        "cub": Member(_F, 200, 5_794),
        "nabirds": Member(_F, 555, 24_633),
        "flowers": Member(_F, 102, 6_149),
        "dogs": Member(_F, 120, 8_580),
        "cars": Member(_F, 196, 8_041),
    },
    "cifar100": {"cifar100": Member(_N, 100, 10_000)},
}

FOLDERS = {"vtab-1k": "vtab-1k", "fgvc": "fgvc", "shared": "vtab"}
"""Where suites lie below `$RESTUNING_DATA`; `cifar100` comes from torchvision."""


def find_tasks(
    where: str, chosen: Sequence[str] = (), label: str | None = None, image: str | None = None
) -> list[SuiteTask]:
    """The tasks of a suite or a folder, or a single data set by its name.

    Args:
        where: A suite (`vtab-1k`, `fgvc`, `shared`: folders below `$RESTUNING_DATA`; `cifar100`),
            a folder of task folders, one task folder, a table of images, or a data set's name (`digits`, `hf:NAME`, ...).
        chosen: Names to keep, in this order; empty for all.
        label: Of a table its column of classes, "label" without; several, with commas, are a task each.
        image: Of a table its column of images, where its name does not say so.

    Raises:
        DataError: No task is there, or columns are named of what is no table.
        UnknownNameError: There is no such suite or data set, or a chosen task is not there.
    """
    tasks = _find_columns(where, label, image)
    if tasks is not None:
        return _choose(tasks, chosen)
    if label is not None or image is not None:
        raise DataError(
            "only a table says its columns",
            where="--label" if label is not None else "--image",
            found=where,
            fix="give a csv or parquet file or hf:NAME, or leave it out",
        )
    if where == "cifar100":
        return [SuiteTask("cifar100", _N, "torchvision:CIFAR100")]
    root = find_place(where)
    if not root.is_dir():
        # A word without a slash may still be the name of a data set.
        if where in FOLDERS or "/" in where or not where:
            raise DataError(
                "no such folder of tasks",
                where=str(root),
                fix=f"give its path, or set {PLACE} (docs/bench.md)",
            )
        if not may_be_data(where):
            known = [*FOLDERS, "cifar100", "digits"]
            near = get_close_matches(where, known, n=1)
            raise UnknownNameError(
                "no such suite, folder or data set",
                where=where,
                found=f"did you mean {near[0]}?" if near else "",
                fix=f"give {', '.join(known)}, torchvision:NAME, hf:NAME or a folder",
            )
        return [SuiteTask(where.rpartition(":")[2].lower(), "", where)]
    # Sorted: the order of runs must not depend on the file system.
    folders = [root] if is_task(root) else sorted(p for p in root.iterdir() if is_task(p))
    if not folders:
        raise DataError(
            "no task in this folder",
            where=str(root),
            found=f"none with {' and '.join(LISTS)}",
            fix="lay tasks out as NAME/train800.txt, val200.txt, test.txt and images/, or as class "
            "folders below train/, val/ and test/ (docs/bench.md)",
        )
    named = {name_of(p): p for p in folders}
    return _choose({n: SuiteTask(n, _find_group(p), str(p)) for n, p in named.items()}, chosen)


def _find_columns(where: str, label: str | None, image: str | None) -> dict[str, SuiteTask] | None:
    """A task for each column of classes of a table; None of other data."""
    path = expand_home(where) if where.strip() else None
    table = path is not None and path.is_file() and path.suffix.lower() in (*TABLES, *PARQUET)
    of_hub = is_hub_set(where)
    if path is None or not (table or of_hub):
        return None
    own = name_hub_set(where) if of_hub else name_of(path)
    if of_hub and label is None and image is None:
        # Its types say which column.
        return {own: SuiteTask(own, "", where)}
    columns = [each.strip() for each in (label or "label").split(",") if each.strip()]
    # A part of paths and of tables, which a column's name need not be.
    names = [re.sub(r"[^\w.-]+", "_", each) for each in columns]
    if not names or len(set(names)) < len(names):
        raise DataError(
            "columns of classes have one name",
            where="--label",
            found=", ".join(columns),
            fix="name each once",
        )
    called = [own] if len(names) == 1 else [f"{own}-{name}" for name in names]
    return {
        name: SuiteTask(name, "", where, column, image)
        for name, column in zip(called, columns, strict=True)
    }


def _choose(tasks: dict[str, SuiteTask], chosen: Sequence[str]) -> list[SuiteTask]:
    for name in chosen:
        if name not in tasks:
            near = get_close_matches(name, tasks, n=3)
            raise UnknownNameError(
                "no such task",
                where=name,
                found=f"did you mean {', '.join(near)}?" if near else "",
                fix=f"one of: {', '.join(tasks)}",
            )
    return [tasks[name] for name in chosen] if chosen else list(tasks.values())


def find_place(where: str) -> Path:
    """Find the folder that a suite's name or a path stands for."""
    if where in FOLDERS:
        return expand_home(os.environ.get(PLACE, ".")) / FOLDERS[where]
    return expand_home(where)


def is_task(folder: Path) -> bool:
    """Whether a folder holds a task: lists, or class folders of three splits."""
    if not folder.is_dir():
        return False
    if all((folder / name).is_file() for name in LISTS):
        return True
    folders = [p.name for p in folder.iterdir() if p.is_dir()]
    return len(find_splits(folders, str(folder))) == len(SPLIT_NAMES)


def _find_group(folder: Path) -> str:
    """The group of a task: from its `task.json`, or as the known suites have it."""
    # Written by whoever laid the folder out; the known suites need none.
    described = folder / "task.json"
    if not described.exists():
        name = name_of(folder)
        groups = [suite[name].group for suite in SUITES.values() if name in suite]
        return groups[0] if groups else ""
    try:
        group = read_json(described).get("group", "")
        if not isinstance(group, str):
            raise FormatError("", found=f'"group" is a {type(group).__name__}')
        return group
    except FormatError as error:
        raise DataError(
            "task.json of a data set is malformed",
            where=str(described),
            found=error.found,
            fix='it is one object with "group" and "classes"',
        ) from None
