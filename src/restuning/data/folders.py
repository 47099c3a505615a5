"""Images on disk: class folders and the VTAB-1K list layout."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from restuning._errors import DataError
from restuning.data.data import (
    SPLIT_SEED,
    Data,
    DataOptions,
    ImageFiles,
    drop_unreadable,
    hash_samples,
    split_by_class,
)
from restuning.data.text_files import read_text, split_lines

if TYPE_CHECKING:
    from restuning.backbones import Preprocessing

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"}
"""Of the files that are taken from a folder."""

LABEL_DIGITS = 9
"""A label with more is a damaged line, not a class."""

MOST_CLASSES = 1_000_000
"""Beyond, one damaged label would ask for as many names."""

_LISTS = {"train": "train800.txt", "val": "val200.txt", "final": "train800val200.txt"}


def from_folder(path: Path, preprocessing: Preprocessing, options: DataOptions) -> Data:
    """A folder in either layout; see `load_data`."""
    listed = (path / _LISTS["train"]).exists()
    splits, labels = _read_vtab_lists(path) if listed else _find_class_folders(path)
    skipped = 0
    if options.skip_bad:
        for key, samples in splits.items():
            splits[key], bad = drop_unreadable(samples)
            skipped += bad
    train = splits["train"] + (splits.get("val", []) if options.final else [])
    plain = preprocessing.transform("none")

    def part(key: str) -> ImageFiles | None:
        return ImageFiles(splits[key], plain, keep=True) if splits.get(key) else None

    return Data(
        path.name,
        ImageFiles(train, preprocessing.transform(options.augment), keep=options.augment == "none"),
        None if options.final else part("val"),
        part("test"),
        labels,
        skipped=skipped,
        identity=hash_samples(
            # The size stands for the contents: a replaced image is another sample.
            [(f"{os.path.relpath(p, path)} {_bytes(p)}", y) for s in splits.values() for p, y in s]
        ),
    )


def _bytes(file: Path) -> int:
    # A file that is missing is told of where it is decoded, by name.
    return file.stat().st_size if file.exists() else -1


def find_images(folder: Path) -> tuple[list[Path], list[Path]]:
    """Image files of a folder, at any depth and in the order of their paths, and its other files.

    Hidden files, such as the `._a.jpg` that macOS writes, are neither.
    """
    images: list[Path] = []
    others: list[Path] = []
    for path in sorted(folder.rglob("*")):
        # Not `is_file`: a link to an image that is gone must be missed by name, not left out.
        if not path.name.startswith(".") and not path.is_dir():
            (images if path.suffix.lower() in IMAGE_SUFFIXES else others).append(path)
    return images, others


def _list_images(path: Path, labels: list[str]) -> list[tuple[Path, int]]:
    samples = [
        (file, labels.index(folder.name))
        for folder in sorted(p for p in path.iterdir() if p.is_dir() and p.name[0] != ".")
        for file in find_images(folder)[0]
    ]
    counts = {labels[y] for _, y in samples}
    empty = [name for name in labels if name not in counts and (path / name).is_dir()]
    if empty or not samples:
        raise DataError(
            "class folders without images",
            where=str(path),
            found=", ".join(empty[:5]) or "none",
            fix=f"put images there ({', '.join(sorted(IMAGE_SUFFIXES))}) or remove the folders",
        )
    return samples


def _find_class_folders(path: Path) -> tuple[dict[str, list[tuple[Path, int]]], list[str]]:
    # Names that data sets on the web use.
    aliases = {"val": ("val", "valid", "validation"), "test": ("test",), "train": ("train",)}
    parts = {
        key: next((path / n for n in names if (path / n).is_dir()), None)
        for key, names in aliases.items()
    }
    if parts["train"] is None and (parts["val"] or parts["test"]):
        raise DataError(
            "a folder with val or test but no train",
            where=str(path),
            found=", ".join(str(p.name) for p in parts.values() if p),
            fix="add train/CLASS/...",
        )
    base = parts["train"] or path
    labels = sorted(p.name for p in base.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(labels) < 2:
        raise DataError(
            "a folder of images needs a folder for each class",
            where=str(base),
            found=f"{len(labels)} folders",
            fix="lay it out as CLASS/image.jpg, optionally below train/, val/ and test/",
        )
    if parts["train"] is not None:
        for key in ("val", "test"):
            folder = parts[key]
            inside = (
                {p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != "."}
                if folder
                else set()
            )
            extra = inside - set(labels)
            if extra:
                raise DataError(
                    "classes that training does not have",
                    where=str(parts[key]),
                    found=", ".join(sorted(extra)[:5]),
                    fix="give them training images",
                )
        return {k: _list_images(p, labels) for k, p in parts.items() if p is not None}, labels
    # One folder a class and no parts: they are drawn once, the same for everybody.
    samples = _list_images(path, labels)
    drawn = split_by_class([y for _, y in samples], (0.7, 0.1), SPLIT_SEED)
    return {
        key: [samples[i] for i in part]
        for key, part in zip(("train", "val", "test"), drawn, strict=True)
    }, labels


def read_list(file: Path) -> list[tuple[Path, int]]:
    """Lines of `images/xxx.jpg label`.

    Raises:
        DataError: A line is malformed, or the file is missing or no text.
    """
    samples = []
    for number, line in enumerate(split_lines(read_text(file)), 1):
        if not line.strip():
            continue
        # From the right: file names may hold spaces.
        name, _, label = line.strip().rpartition(" ")
        if not name or not label.isascii() or not label.isdigit() or len(label) > LABEL_DIGITS:
            raise DataError(
                "a line of a list is malformed",
                where=f"{file}, line {number}",
                found=line[:80],
                fix="write `images/xxx.jpg label` with a label from 0",
            )
        samples.append((file.parent / name.strip(), int(label)))
    return samples


def _read_vtab_lists(path: Path) -> tuple[dict[str, list[tuple[Path, int]]], list[str]]:
    names = {"train": _LISTS["train"], "val": _LISTS["val"], "test": "test.txt"}
    splits = {k: read_list(path / v) for k, v in names.items() if (path / v).exists()}
    if not splits.get("train"):
        raise DataError(
            "an empty training list",
            where=str(path / names["train"]),
            fix="write lines of `images/xxx.jpg label`",
        )
    highest = max((y for s in splits.values() for _, y in s), default=-1)
    if highest >= MOST_CLASSES:
        raise DataError(
            "a label is too large to be a class number",
            where=str(path),
            found=str(highest),
            fix="correct the lists",
        )
    # Lists hold numbers; names are in a file beside them, where somebody wrote one.
    described = path / "task.json"
    labels = [str(i) for i in range(highest + 1)]
    if described.exists():
        try:
            classes = json.loads(read_text(described))["classes"]
            if not isinstance(classes, list):
                # A word is a sequence too, of its letters.
                raise TypeError(f"classes is {classes!r:.60}")
            labels = list(map(str, classes))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                "task.json of a data set is malformed",
                where=str(described),
                found=str(error),
                fix='it needs "classes", a list of names',
            ) from None
    if highest >= len(labels) or highest < 0:
        raise DataError(
            "labels and classes do not fit",
            where=str(path),
            found=f"highest label {highest}, {len(labels)} classes",
            fix="correct the lists",
        )
    return splits, labels
