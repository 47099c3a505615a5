"""Data sets by name or path."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from restuning._errors import DataError, UnknownNameError, require
from restuning.data.data import (
    Arrays,
    Data,
    ImageFiles,
    identity,
    readable,
    stratified,
    text_batch,
)

if TYPE_CHECKING:
    from restuning.backbones import Backbone, Preprocessing

SPLIT_SEED = 0
"""Splits that a data set does not bring are drawn once, with this seed, never the run's."""

_IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"}
_LISTS = {"train": "train800.txt", "val": "val200.txt", "final": "train800val200.txt"}


def load_data(
    name: str,
    backbone: Backbone,
    *,
    augment: str = "none",
    skip_bad: bool = False,
    final: bool = False,
    text: str = "text",
    label: str = "label",
    root: str | Path = "data",
) -> Data:
    """Load a data set with the backbone's own preprocessing.

    Args:
        name: `digits`; a folder of class folders (with or without train/val/test); a folder in
            VTAB-1K list layout; `torchvision:NAME`; `hf:NAME`; a csv file or folder of csv files.
        backbone: Whose preprocessing or tokenizer is used.
        augment: Training images: "none", "flip", "timm", "timm:POLICY".
        skip_bad: Leave corrupt images out and count them.
        final: Train on train and val together (after settings were chosen on val).
        text, label: Columns of a csv.
        root: Where torchvision data sets lie.

    Raises:
        DataError: Missing or malformed data.
        UnknownNameError: No such data set.
    """
    path = Path(name).expanduser()
    scheme, _, rest = name.partition(":")
    if path.suffix == ".csv" or (path.is_dir() and (path / "train.csv").exists()):
        return _csv(path, backbone, text, label)
    if backbone.preprocessing is None:
        raise DataError(
            "a text backbone needs text", where=name, fix="give a csv file, or an image backbone"
        )
    if name == "digits":
        return _digits(backbone.preprocessing, augment, final)
    if scheme == "torchvision" and rest:
        return _torchvision(rest, backbone.preprocessing, augment, final, root)
    if scheme == "hf" and rest:
        return _hf(rest, backbone.preprocessing, augment, final)
    if path.is_dir():
        listed = (path / _LISTS["train"]).exists()
        splits, labels = _vtab(path) if listed else _folder(path)
        return _files(path, splits, labels, backbone.preprocessing, augment, skip_bad, final)
    raise UnknownNameError(
        "no such data set", where=name,
        fix="give `digits`, a folder, a csv file, torchvision:NAME or hf:NAME",
    )  # fmt: skip


def _digits(preprocessing: Preprocessing, augment: str, final: bool) -> Data:
    from sklearn.datasets import load_digits

    raw: Any = load_digits()
    images = [Image.fromarray((x * 255 / 16).astype(np.uint8)) for x in raw.images]
    labels = raw.target.tolist()
    splits = stratified(labels, (0.5, 0.15), SPLIT_SEED)
    return _arrays("digits", images, labels, splits, [str(d) for d in range(10)], preprocessing,
                   augment, final)  # fmt: skip


def _arrays(
    name: str, images: list[Any], labels: list[int], splits: list[list[int]], names: list[str],
    preprocessing: Preprocessing, augment: str, final: bool,
) -> Data:  # fmt: skip
    train, val, test = splits
    train = [*train, *val] if final else train

    def part(indices: list[int], policy: str) -> Arrays:
        return Arrays([images[i] for i in indices], [labels[i] for i in indices],
                      preprocessing.augmented(policy), keep=policy == "none")  # fmt: skip

    return Data(
        name, part(train, augment), None if final else part(val, "none"), part(test, "none"),
        names, identity=identity([(i, labels[i]) for s in splits for i in s]),
    )  # fmt: skip


def _files(
    path: Path, splits: dict[str, list[tuple[Path, int]]], labels: list[str],
    preprocessing: Preprocessing, augment: str, skip_bad: bool, final: bool,
) -> Data:  # fmt: skip
    skipped = 0
    if skip_bad:
        for key, samples in splits.items():
            splits[key], bad = readable(samples)
            skipped += bad
    train = splits["train"] + (splits.get("val", []) if final else [])
    clean = preprocessing.augmented("none")

    def part(key: str) -> ImageFiles | None:
        return ImageFiles(splits[key], clean, keep=True) if splits.get(key) else None

    return Data(
        path.name, ImageFiles(train, preprocessing.augmented(augment), keep=augment == "none"),
        None if final else part("val"), part("test"), labels, skipped=skipped,
        identity=identity([(p.relative_to(path), y) for s in splits.values() for p, y in s]),
    )  # fmt: skip


def _class_folders(path: Path, labels: list[str]) -> list[tuple[Path, int]]:
    samples = [
        (file, labels.index(folder.name))
        for folder in sorted(p for p in path.iterdir() if p.is_dir())
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in _IMAGES
    ]
    counts = {labels[y] for _, y in samples}
    empty = [name for name in labels if name not in counts and (path / name).is_dir()]
    if empty or not samples:
        raise DataError(
            "class folders without images", where=str(path), found=", ".join(empty[:5]) or "none",
            fix=f"put images there ({', '.join(sorted(_IMAGES))}) or remove the folders",
        )  # fmt: skip
    return samples


def _folder(path: Path) -> tuple[dict[str, list[tuple[Path, int]]], list[str]]:
    aliases = {"val": ("val", "valid", "validation"), "test": ("test",), "train": ("train",)}
    found = {
        key: next((path / n for n in names if (path / n).is_dir()), None)
        for key, names in aliases.items()
    }
    base = found["train"] or path
    labels = sorted(p.name for p in base.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(labels) < 2:
        raise DataError(
            "a folder of images needs a folder for each class", where=str(base),
            found=f"{len(labels)} folders", fix="lay it out as CLASS/image.jpg, optionally below "
            "train/, val/ and test/",
        )  # fmt: skip
    if found["train"] is not None:
        for key in ("val", "test"):
            folder = found[key]
            inside = {p.name for p in folder.iterdir() if p.is_dir()} if folder else set()
            extra = inside - set(labels)
            if extra:
                raise DataError(
                    "classes that training does not have", where=str(found[key]),
                    found=", ".join(sorted(extra)[:5]), fix="give them training images",
                )  # fmt: skip
        return {k: _class_folders(p, labels) for k, p in found.items() if p is not None}, labels
    samples = _class_folders(path, labels)
    parts = stratified([y for _, y in samples], (0.7, 0.1), SPLIT_SEED)
    return {
        key: [samples[i] for i in part]
        for key, part in zip(("train", "val", "test"), parts, strict=True)
    }, labels


def read_list(file: Path) -> list[tuple[Path, int]]:
    """Lines of `images/xxx.jpg label`.

    Raises:
        DataError: A line is malformed, or the file is missing or no text.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            "a list of images cannot be read", where=str(file), found=str(error)[:200],
            fix="restore it; lines read `images/xxx.jpg label`",
        ) from None  # fmt: skip
    samples = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        if not name or not label.isascii() or not label.isdigit():
            raise DataError(
                "a line of a list is malformed", where=f"{file}, line {number}",
                found=line[:80], fix="write `images/xxx.jpg label` with a label from 0",
            )  # fmt: skip
        samples.append((file.parent / name.strip(), int(label)))
    return samples


def _vtab(path: Path) -> tuple[dict[str, list[tuple[Path, int]]], list[str]]:
    names = {"train": _LISTS["train"], "val": _LISTS["val"], "test": "test.txt"}
    splits = {k: read_list(path / v) for k, v in names.items() if (path / v).exists()}
    highest = max((y for s in splits.values() for _, y in s), default=-1)
    described = path / "task.json"
    labels = [str(i) for i in range(highest + 1)]
    if described.exists():
        try:
            labels = list(map(str, json.loads(described.read_text(encoding="utf-8"))["classes"]))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                "task.json of a data set is malformed", where=str(described), found=str(error),
                fix='it needs "classes", a list of names',
            ) from None  # fmt: skip
    if highest >= len(labels) or highest < 0:
        raise DataError(
            "labels and classes do not fit", where=str(path),
            found=f"highest label {highest}, {len(labels)} classes", fix="correct the lists",
        )  # fmt: skip
    return splits, labels


def _csv_rows(file: Path, text: str, label: str) -> list[tuple[str, str]]:
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream)
            columns = reader.fieldnames or []
            if text not in columns or label not in columns:
                raise DataError(
                    "a csv lacks a column", where=str(file), found=f"columns {list(columns)[:8]}",
                    fix="name them with --text and --label",
                )  # fmt: skip
            return [(row[text] or "", row[label] or "") for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            "a csv cannot be read", where=str(file), found=str(error)[:200], fix="restore it"
        ) from None


def _csv(path: Path, backbone: Backbone, text: str, label: str) -> Data:
    if backbone.tokenizer is None:
        raise DataError(
            "text needs a language backbone", where=str(path), found=f"backbone {backbone.name}",
            fix="give one, e.g. --backbone hf:sentence-transformers/all-MiniLM-L6-v2",
        )  # fmt: skip
    if path.is_dir():
        files = {k: path / f"{k}.csv" for k in ("train", "val", "test")}
        rows = {k: _csv_rows(f, text, label) for k, f in files.items() if f.exists()}
    else:
        whole = _csv_rows(path, text, label)
        known = sorted({y for _, y in whole})
        parts = stratified([known.index(y) for _, y in whole], (0.7, 0.1), SPLIT_SEED)
        rows = {
            k: [whole[i] for i in p] for k, p in zip(("train", "val", "test"), parts, strict=True)
        }
    labels = sorted({y for _, y in rows["train"]}, key=lambda y: (len(y), y))
    if len(labels) < 2:
        raise DataError("a classification needs two classes", where=str(path),
                        found=f"{len(labels)}", fix="check the label column")  # fmt: skip
    splits: dict[str, Any] = {}
    for key, pairs in rows.items():
        unknown = {y for _, y in pairs} - set(labels)
        if unknown:
            raise DataError("classes that training does not have", where=f"{path} ({key})",
                            found=", ".join(sorted(unknown)[:5]), fix="correct the label column")  # fmt: skip
        splits[key] = [(t, labels.index(y)) for t, y in pairs]
    return Data(
        path.stem, splits["train"], splits.get("val"), splits.get("test"), labels, "text",
        text_batch(backbone.tokenizer), identity=identity([p for s in splits.values() for p in s]),
    )  # fmt: skip


def _torchvision(
    name: str, preprocessing: Preprocessing, augment: str, final: bool, root: str | Path
) -> Data:
    sets = require("torchvision.datasets", "transformers", f"the data set torchvision:{name}")
    cls = getattr(sets, name, None)
    if cls is None:
        raise UnknownNameError("torchvision has no such data set", where=name, fix="e.g. CIFAR100")
    try:
        try:
            parts = cls(root, train=True), cls(root, train=False)
        except TypeError:
            parts = cls(root, split="train"), cls(root, split="test")
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(
            "a torchvision data set is not there", where=f"{name} in {root}",
            found=str(error).splitlines()[0][:200],
            fix=f"download it once: torchvision.datasets.{name}({str(root)!r}, download=True)",
        ) from None  # fmt: skip
    images = [sample[0] for part in parts for sample in part]
    labels = [int(sample[1]) for part in parts for sample in part]
    train, val = stratified(labels[: len(parts[0])], (0.9,), SPLIT_SEED)
    names = list(getattr(parts[0], "classes", map(str, sorted(set(labels)))))
    splits = [train, val, list(range(len(parts[0]), len(labels)))]
    return _arrays(name.lower(), images, labels, splits, names, preprocessing, augment, final)


def _hf(name: str, preprocessing: Preprocessing, augment: str, final: bool) -> Data:
    hf = require("datasets", "datasets", f"the data set hf:{name}")
    try:
        path = Path(name)
        sets = hf.load_from_disk(name) if path.is_dir() else hf.load_dataset(name)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            "a Hugging Face data set could not be loaded", where=name,
            found=str(error).splitlines()[0][:200], fix="check the name, the network or the folder",
        ) from None  # fmt: skip
    parts = sets if isinstance(sets, dict) else {"train": sets}
    column = next((c for c in ("label", "labels", "fine_label") if c in parts["train"].features),
                  None)  # fmt: skip
    picture = next((c for c in ("image", "img") if c in parts["train"].features), None)
    if column is None or picture is None:
        raise DataError("no image and label columns", where=name,
                        found=", ".join(parts["train"].features), fix="rename them")  # fmt: skip
    feature = parts["train"].features[column]
    images: list[Any] = []
    labels: list[int] = []
    bounds = []
    for key in ("train", "validation", "test"):
        start = len(labels)
        if key in parts:
            images += list(parts[key][picture])
            labels += [int(y) for y in parts[key][column]]
        bounds.append(list(range(start, len(labels))))
    names = list(getattr(feature, "names", None) or map(str, range(max(labels) + 1)))
    if not bounds[2]:
        bounds = stratified([labels[i] for i in bounds[0]], (0.7, 0.1), SPLIT_SEED)
    return _arrays(Path(name).name, images, labels, bounds, names, preprocessing, augment, final)
