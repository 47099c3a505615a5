"""Which tars or parquet files a name means: one, a folder of them, a pattern, or several; and the split that each is of."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from restuning._errors import DataError
from restuning._files import expand_home
from restuning.data.folders import LISTS
from restuning.data.listing import has_folders_of, is_folder, list_entries
from restuning.data.media import IMAGES, SOUNDS
from restuning.data.remote import File, is_url, list_files_of, list_fitting, show_url
from restuning.data.splits import SPLIT_NAMES, find_splits
from restuning.data.texts import PARQUET, TABLES, TAGGED, find_files


@dataclass(frozen=True)
class Kind:
    """Of files that hold many examples each.

    Attributes:
        suffix: In small letters.
        noun, nouns: For messages.
    """

    suffix: str
    noun: str
    nouns: str


TARS = Kind(".tar", "tar", "tars")
PARQUETS = Kind(PARQUET[0], "parquet file", "parquet files")

MOST_SHARDS = 1_000_000
"""A pattern that stands for more is a slip of the keyboard."""

_OF_A_HUB = re.compile(r"(hf|torchvision):(?!//)")
_RANGE = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")
_CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")


@dataclass(frozen=True)
class Shards:
    """The files of a data set.

    Attributes:
        name: What the data set is called.
        splits: Files of "train", "val" and "test", or of "whole" where names say no split.
        names: What each file is called in ids, without its suffix: its path below what all share.
    """

    name: str
    splits: Mapping[str, Sequence[File]]
    names: Mapping[File, str]


def find_shards(name: Any, kind: Kind = TARS) -> Shards | None:
    """The tars (or parquet files) that a name means; None where it means something else.

    `x.tar`; `x-{000..127}.tar` and `{a,b}.tar`; `x-*.tar`; several of these with commas between, or in a list; a
    folder that holds tars and neither class folders nor tables, itself or in `train/`, `val/` and `test/`;
    each by path or by URL. Tars whose names begin with that of a split (`train-000.tar`) are of that split.

    Args:
        name: As the user gave it.
        kind: Of the files.

    Raises:
        DataError: A pattern that no file fits, or splits without a training split.
    """
    if isinstance(name, list | tuple):
        if not name or not all(isinstance(each, str | Path) for each in name):
            return None
        parts = list(map(str, name))
    elif isinstance(name, str | Path) and str(name).strip():
        whole = str(name)
        # `hf:x.parquet` ends like one, and is read by another library.
        if _OF_A_HUB.match(whole) and not os.path.exists(whole):
            return None
        parts = [whole] if os.path.exists(expand_home(whole)) else _apart(whole)
    else:
        return None
    # What Spark calls `x.parquet` is a folder.
    folder = len(parts) == 1 and os.path.isdir(expand_home(parts[0]))
    if folder or (len(parts) == 1 and not any(_is(each, parts[0]) for each in (TARS, PARQUETS))):
        return _of_folder(parts[0], kind)
    if not parts or not all(_is(kind, part) for part in parts):
        return None
    found = [file for part in parts for file in _expand(part, kind)]
    return _make(found, str(name) if isinstance(name, str | Path) else parts[0], False, kind)


def _is(kind: Kind, part: str) -> bool:
    # Behind a `?` a URL is signed.
    path = part.partition("?")[0] if is_url(part) else part
    return path.lower().endswith(kind.suffix)


def _apart(name: str) -> list[str]:
    """What commas outside of braces part."""
    return [part.strip() for part in re.split(r",(?![^{}]*\})", name) if part.strip()]


def _expand(part: str, kind: Kind) -> list[str]:
    """The files that one pattern stands for."""
    url = is_url(part)
    part = part if url else str(expand_home(part))
    if not url and os.path.exists(part):
        return [part]
    found = _expand_braces(part, part, kind)
    if not re.search(r"\*" if url else r"[*?]", part):
        return found
    fitting: list[str] = []
    for each in found:
        if url:
            fitting += list_fitting(each)
        else:
            top = Path(each).parent
            fitting += sorted(map(str, top.glob(Path(each).name)))
    if not fitting:
        raise DataError(
            f"no {kind.noun} fits the pattern",
            where=show_url(part),
            fix="correct it; `*` stands for letters of a file's name, not of a folder's",
        )
    return fitting


def _expand_braces(part: str, whole: str, kind: Kind) -> list[str]:
    """As a shell does it: `{000..127}` keeps its zeros, `{a,b}` is either."""
    pieces: list[list[str]] = []
    rest = part
    while found := _RANGE.search(rest) or _CHOICE.search(rest):
        pieces.append([rest[: found.start()]])
        if ".." in found[0] and "," not in found[0]:
            first, last = int(found[1]), int(found[2])
            width = max(len(found[1]), len(found[2])) if found[1][0] == "0" else 0
            if abs(last - first) >= MOST_SHARDS:
                raise _too_many(whole, kind)
            step = 1 if first <= last else -1
            pieces.append([str(n).zfill(width) for n in range(first, last + step, step)])
        else:
            pieces.append(found[1].split(","))
        rest = rest[found.end() :]
    pieces.append([rest])
    count = 1
    for piece in pieces:
        count *= len(piece)
    if count > MOST_SHARDS:
        raise _too_many(whole, kind)
    return ["".join(each) for each in itertools.product(*pieces)]


def _too_many(whole: str, kind: Kind) -> DataError:
    return DataError(
        f"a pattern stands for too many {kind.nouns}",
        where=show_url(whole),
        found=f"more than {MOST_SHARDS:,}",
        fix="correct its numbers",
    )


def _of_folder(name: str, kind: Kind) -> Shards | None:
    if is_url(name):
        there = list_files_of(name)
        files = [[each for each in there if _is(k, each)] for k in (TARS, PARQUETS)]
        if not any(files):
            raise DataError(
                "neither tars nor parquet files at a URL",
                where=show_url(name),
                found=f"{len(there):,} files",
                fix="give the URL of such files or of a folder of them; folders of images and csv files are read from a disk",
            )
        # Beside tars, parquet files are notes about them.
        first = TARS if files[0] else PARQUETS
        return _make(files[0] or files[1], name, True, kind) if kind is first else None
    path = expand_home(name)
    if not path.is_dir():
        return None
    entries = list_entries(path).items()
    named = find_splits([each for each, entry in entries if is_folder(entry)], name)
    folders = [path, *(path / each for each in named.values())]
    found = [str(each) for folder in folders for each in _list_files(folder, kind)]
    if (
        not found
        or any(has_folders_of(path, media.suffixes()) for media in (IMAGES, SOUNDS))
        or (path / LISTS["train"]).exists()
    ):
        # An archive beside what was in it.
        return None
    if kind is PARQUETS and any(_list_files(each, TARS) or _has_media(each) for each in folders):
        # Notes about them.
        return None
    tables = any(find_files(path, kinds) for kinds in (TABLES, PARQUET, TAGGED))
    return None if tables else _make(found, name, True, kind)


def _has_media(folder: Path) -> bool:
    """Whether a folder, or a folder in it, holds images or sounds."""
    suffixes = {*IMAGES.suffixes(), *SOUNDS.suffixes()}
    inside = [folder / each for each, entry in list_entries(folder).items() if is_folder(entry)]
    return any(
        Path(name).suffix.lower() in suffixes
        for each in [folder, *inside]
        for name in list_entries(each)
    )


def _list_files(folder: Path, kind: Kind) -> list[Path]:
    entries = list_entries(folder).items()
    return [
        folder / each
        for each in sorted(e for e, entry in entries if _is(kind, e) and not is_folder(entry))
    ]


def _make(found: Sequence[str], name: str, folder: bool, kind: Kind) -> Shards:
    files = [File(each) for each in dict.fromkeys(found)]
    paths = [
        each.partition("://")[2].partition("?")[0] if is_url(each) else each
        for each in dict.fromkeys(found)
    ]
    top = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    names = {
        file: Path(os.path.relpath(os.path.abspath(path), top)).as_posix()[: -len(kind.suffix)]
        for file, path in zip(files, paths, strict=True)
    }
    places: dict[str, str] = {}
    for file in files:
        # One file in two splits would be asked about what was learned from it.
        place = file.name if is_url(file.name) else os.path.realpath(file.name)
        if place in places:
            raise DataError(
                f"one {kind.noun} is named in two ways",
                where=str(file),
                found=f"it is {show_url(places[place])} as well",
                fix="name it once",
            )
        places[place] = file.name
    # By shard's name, whatever order they were given or listed in.
    files.sort(key=lambda file: names[file])
    splits: dict[str, list[File]] = {}
    for file in files:
        splits.setdefault(_split_of(names[file]), []).append(file)
    if "whole" in splits and len(splits) > 1:
        raise DataError(
            f"some {kind.nouns} are of a split, and others of none",
            where=show_url(name),
            found=f"{names[splits['whole'][0]]}{kind.suffix}, beside {', '.join(s for s in splits if s != 'whole')}",
            fix="begin the name of each with train, val or test, or name those that are meant",
        )
    if len(splits) == 1:
        # All of one: it is the whole that was named.
        splits = {"whole": files}
    if "whole" not in splits and "train" not in splits:
        raise DataError(
            f"{kind.nouns} of val or test and none of train",
            where=show_url(name),
            fix="name those of train as well",
        )
    return Shards(_name(name, names, files, folder, kind), splits, names)


def _split_of(name: str) -> str:
    """The split that a shard's name says, by its folder or its first word."""
    for word in [*PurePosixPath(name).parts[:-1], re.split(r"[-_.]", PurePosixPath(name).name)[0]]:
        for split, known in SPLIT_NAMES.items():
            if word.lower() in known:
                return split
    return "whole"


def _name(
    name: str, names: Mapping[File, str], files: Sequence[File], folder: bool, kind: Kind
) -> str:
    """What the data set is called: its folder, or what its files' names begin with."""
    if folder:
        path = (
            name.partition("://")[2].rstrip("/")
            if is_url(name)
            else os.path.abspath(expand_home(name))
        )
        return os.path.basename(path) or kind.nouns.partition(" ")[0]
    shared = os.path.commonprefix([PurePosixPath(names[file]).name for file in files])
    if len(files) > 1:
        # What is left of a number that they share is no name.
        shared = re.sub(r"[-_.]*\d*$", "", shared)
    return shared.strip("-_. ") or kind.nouns.partition(" ")[0]
