"""Which files of a folder are images or sounds, and what is passed over: named, or known to be nobody's data."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from restuning._errors import DataError
from restuning.backbones.audio import AUDIO_SUFFIXES
from restuning.backbones.images import AVIF_SUFFIXES, HEIF_SUFFIXES, image_suffixes
from restuning.data.splits import find_splits

LITTER = frozenset(
    ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "$recycle.bin")
    + ("system volume information", "lost+found")
)
"""What systems leave in folders, in small letters; all that begins with a dot is passed over as well."""

OUR_FILES = (
    # A run, also one that was killed; a comparison, sweep and grid; a task; a store of features.
    frozenset(("log.jsonl", "checkpoints")),
    frozenset(("log.jsonl", "metrics.json")),
    frozenset(("comparison.json", "comparison.png")),
    frozenset(("grid.json", "arms")),
    frozenset(("grid.json", "runs")),
    frozenset(("report.html", "report.md")),
    frozenset(("task.json", "weights.safetensors")),
    frozenset(("key.json", "manifest.json")),
)
"""Files by which a folder is known to be one that this library left; each set is enough."""

# A line each: who makes pages of the names does not see a tuple's.
NO_IMAGE = "no image"
NO_SOUND = "no sound"
LOOSE_SOUND = "loose sound"
NEEDS_EXTRA = "needs an extra"
CORRUPT = "corrupt"
OURS, BACK, LOOSE, BESIDE = "ours", "back", "loose", "beside"
NO_PAIR = "no pair"
NO_PAIR_OF_DEPTH = "no pair of depth"

_IN_WORDS = {
    CORRUPT: ("corrupt file", "corrupt files"),
    NO_IMAGE: ("file that is no image", "files that are no images"),
    NEEDS_EXTRA: (
        "file that needs `pip install 'restuning[heif]'`",
        "files that need `pip install 'restuning[heif]'`",
    ),
    NO_SOUND: ("file that is no sound", "files that are no sounds"),
    LOOSE: ("image in no class folder", "images in no class folder"),
    LOOSE_SOUND: ("sound in no class folder", "sounds in no class folder"),
    BESIDE: ("folder beside the splits", "folders beside the splits"),
    NO_PAIR: ("mask without an image", "masks without an image"),
    NO_PAIR_OF_DEPTH: ("depth map without an image", "depth maps without an image"),
    OURS: ("folder of an earlier run", "folders of earlier runs"),
    BACK: ("link back to a folder above it", "links back to folders above them"),
}
"""Reasons why something is left out, for one and for more."""

NAMED = 3
"""Of what is left out, named; the rest is counted."""

LeftOut = dict[str, list[Path]]
"""What was left out, by reason."""


def find_images(folder: Path) -> tuple[list[Path], LeftOut]:
    """Image files of a folder, at any depth and in the order of their paths, and what is left out.

    Links are followed, a folder that is reached twice is read once, and one above is not entered
    again. What systems leave (`LITTER`, hidden files) is neither image nor left out.

    Args:
        folder: The folder; it is read even where it is one that this library left.

    Raises:
        DataError: A folder cannot be read.
    """
    return _find_files(folder, image_suffixes(), why_left_out)


def find_sounds(folder: Path) -> tuple[list[Path], LeftOut]:
    """Sound files of a folder, as `find_images` finds images.

    Raises:
        DataError: A folder cannot be read.
    """
    return _find_files(folder, AUDIO_SUFFIXES, lambda file: NO_SOUND)


def _find_files(
    folder: Path, suffixes: Collection[str], why: Callable[[Path], str]
) -> tuple[list[Path], LeftOut]:
    found: list[Path] = []
    left_out: LeftOut = {}
    above = list_above(folder)
    seen = {locate(folder)}
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        entries = list_entries(here)
        if here != folder and is_ours(entries):
            left_out.setdefault(OURS, []).append(here)
            continue
        folders = []
        # In their order, so that of two ways to one folder always the same is taken.
        for name, entry in sorted(entries.items()):
            path = here / name
            # Not `is_file`: a link to a file that is gone must be missed by name, not left out.
            if is_folder(entry):
                place = locate(path)
                if entry.is_symlink() and place in above | _between(here, folder):
                    left_out.setdefault(BACK, []).append(path)
                elif place not in seen:
                    seen.add(place)
                    folders.append(path)
            elif path.suffix.lower() in suffixes:
                found.append(path)
            else:
                left_out.setdefault(why(path), []).append(path)
        waiting += reversed(folders)
    return sorted(found), {why: sorted(paths) for why, paths in left_out.items()}


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or a link to one; a link that leads nowhere, or round, is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def has_folders_of(path: Path, suffixes: Collection[str]) -> bool:
    """Whether a folder holds two folders of such files or more, or a split's folder that does."""
    if not path.is_dir():
        return False
    folders = [each for each in path.iterdir() if each.is_dir() and not each.name.startswith(".")]
    named = find_splits([each.name for each in folders], str(path)).values()
    if any(has_folders_of(path / split, suffixes) for split in named):
        return True
    # Images of a table may lie in train/ and test/ as well.
    classes = (each for each in folders if each.name not in named)
    return sum(any(f.suffix.lower() in suffixes for f in each.iterdir()) for each in classes) > 1


def list_entries(folder: Path) -> dict[str, os.DirEntry[str]]:
    """What is in a folder, by name, without litter.

    Raises:
        DataError: It cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return {
                entry.name: entry
                for entry in entries
                if not entry.name.startswith(".") and entry.name.lower() not in LITTER
            }
    except OSError as error:
        raise DataError(
            "a folder cannot be read",
            where=str(folder),
            found=error.strerror or str(error),
            fix="make it readable, or take it out",
        ) from None


def is_ours(names: Mapping[str, object]) -> bool:
    """Whether a folder of these files is one that this library left: a run, a task, a store."""
    if names.keys() == {"log.jsonl"} or ("key.json" in names and any(map(_is_array, names))):
        # A run or a store that was killed when it had hardly begun.
        return True
    return any(names.keys() >= files for files in OUR_FILES)


def _is_array(name: str) -> bool:
    return name.endswith(".npy")


def why_left_out(file: Path) -> str:
    """The reason for a file that is not taken for an image."""
    extra = file.suffix.lower() in HEIF_SUFFIXES | AVIF_SUFFIXES
    return NEEDS_EXTRA if extra else NO_IMAGE


def say_left_out(left_out: Mapping[str, Sequence[object]]) -> str:
    """What was left out in a few words, the first of each kind by name; "" for nothing."""
    parts = []
    for why, names in left_out.items():
        if names:
            few = ", ".join(map(str, names[:NAMED])) + (", ..." if len(names) > NAMED else "")
            parts.append(f"{len(names):,} {_IN_WORDS[why][len(names) > 1]} ({few})")
    return "; ".join(parts)


def merge_left_out(into: LeftOut, more: Mapping[str, Sequence[Path]]) -> None:
    """Add what was left out of another folder."""
    for why, paths in more.items():
        into.setdefault(why, []).extend(paths)


def list_above(folder: Path) -> set[tuple[int, int]]:
    """Places of all folders that a folder lies in, by its path and by where links lead."""
    return {locate(p) for each in (folder.absolute(), folder.resolve()) for p in each.parents}


def locate(folder: Path) -> tuple[int, int]:
    """The device and inode of a folder: the same for all ways to it."""
    about = folder.stat()
    return about.st_dev, about.st_ino


def _between(here: Path, top: Path) -> set[tuple[int, int]]:
    """The folders from one up to the top, both included."""
    return {locate(here), *(locate(p) for p in here.parents if p.is_relative_to(top))}
