"""Images in memory: scikit-learn's digits, torchvision and Hugging Face data sets by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from restuning._errors import DataError, UnknownNameError, require
from restuning.data.data import (
    SPLIT_SEED,
    Arrays,
    Data,
    DataOptions,
    hash_samples,
    split_by_class,
)

if TYPE_CHECKING:
    from restuning.backbones import Preprocessing


@dataclass(frozen=True)
class _Pool:
    """All images of a data set, whatever split they belong to.

    Attributes:
        images: Whatever `read_image` takes.
        labels: One each.
        splits: Indices of train, val and test.
        names: Of the classes.
    """

    images: list[Any]
    labels: list[int]
    splits: list[list[int]]
    names: list[str]

    def to_data(self, name: str, preprocessing: Preprocessing, options: DataOptions) -> Data:
        """As a data set."""
        train, val, test = self.splits
        train = [*train, *val] if options.final else train

        def part(indices: list[int], policy: str) -> Arrays:
            return Arrays(
                [self.images[i] for i in indices],
                [self.labels[i] for i in indices],
                preprocessing.transform(policy),
                # An augmented image is another one each time.
                keep=policy == "none",
            )

        return Data(
            name,
            part(train, options.augment),
            None if options.final or not val else part(val, "none"),
            part(test, "none") if test else None,
            self.names,
            identity=hash_samples([(i, self.labels[i]) for s in self.splits for i in s]),
        )


def from_sklearn(preprocessing: Preprocessing, options: DataOptions) -> Data:
    """scikit-learn's 1797 real handwritten digits, 8 x 8 pixels, in fixed splits."""
    from sklearn.datasets import load_digits

    raw: Any = load_digits()
    # Pixels of scikit-learn have values from 0 to 16.
    images = [Image.fromarray((x * 255 / 16).astype(np.uint8)) for x in raw.images]
    labels = raw.target.tolist()
    splits = split_by_class(labels, (0.5, 0.15), SPLIT_SEED)
    pool = _Pool(images, labels, splits, [str(d) for d in range(10)])
    return pool.to_data("digits", preprocessing, options)


def from_torchvision(name: str, preprocessing: Preprocessing, options: DataOptions) -> Data:
    """A torchvision data set that has been downloaded before."""
    sets = require("torchvision.datasets", "transformers", f"the data set torchvision:{name}")
    cls = getattr(sets, name, None)
    if not isinstance(cls, type) or not issubclass(cls, sets.VisionDataset):
        raise UnknownNameError("torchvision has no such data set", where=name, fix="e.g. CIFAR100")
    root = options.root
    try:
        # Older data sets take `train`, newer ones `split`; some neither.
        try:
            parts = cls(root, train=True), cls(root, train=False)
        except TypeError:
            parts = cls(root, split="train"), cls(root, split="test")
    except TypeError:
        raise DataError(
            "a torchvision data set without a training and a test part",
            where=name,
            fix="save its images as class folders and give that folder",
        ) from None
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(
            "a torchvision data set is not there",
            where=f"{name} in {root}",
            found=str(error).splitlines()[0][:200],
            fix=f"download it once: torchvision.datasets.{name}({str(root)!r}, download=True)",
        ) from None
    images = [sample[0] for part in parts for sample in part]
    labels = [int(sample[1]) for part in parts for sample in part]
    # Validation is taken from the training part; the published test part stays whole.
    train, val = split_by_class(labels[: len(parts[0])], (0.9,), SPLIT_SEED)
    names = list(getattr(parts[0], "classes", map(str, sorted(set(labels)))))
    # The images of both parts stand in one list, those of the test part last.
    splits = [train, val, list(range(len(parts[0]), len(labels)))]
    return _Pool(images, labels, splits, names).to_data(name.lower(), preprocessing, options)


def from_hub(name: str, preprocessing: Preprocessing, options: DataOptions) -> Data:
    """A Hugging Face data set by name, or a folder that `save_to_disk` wrote."""
    hf = require("datasets", "datasets", f"the data set hf:{name}")
    try:
        path = Path(name)
        sets = hf.load_from_disk(name) if path.is_dir() else hf.load_dataset(name)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            "a Hugging Face data set could not be loaded",
            where=name,
            found=str(error).splitlines()[0][:200],
            fix="check the name, the network or the folder",
        ) from None
    parts = sets if isinstance(sets, dict) else {"train": sets}
    if "train" not in parts:
        raise DataError(
            "a data set without a train split",
            where=name,
            found=f"splits {', '.join(parts)}",
            fix="rename one to train",
        )
    # CIFAR-100 brings coarse labels, too; the fine ones are what is reported on it.
    column = next(
        (c for c in ("label", "labels", "fine_label") if c in parts["train"].features), None
    )
    picture = next((c for c in ("image", "img") if c in parts["train"].features), None)
    if column is None or picture is None:
        raise DataError(
            "no image and label columns",
            where=name,
            found=", ".join(parts["train"].features),
            fix="rename them",
        )
    feature = parts["train"].features[column]
    if feature.dtype == "string":
        raise DataError(
            "labels are words, not class numbers",
            where=f"{name}, column {column}",
            fix=f'number them once: dataset.class_encode_column("{column}")',
        )
    images: list[Any] = []
    labels: list[int] = []
    bounds: list[list[int]] = []
    for key in ("train", "validation", "test"):
        start = len(labels)
        if key in parts:
            images += _list_pictures(parts[key], picture)
            labels += [int(y) for y in parts[key][column]]
        bounds.append(list(range(start, len(labels))))
    names = list(getattr(feature, "names", None) or map(str, range(max(labels) + 1)))
    # Hub data sets mark the labels of a hidden test split with -1.
    wrong = [y for y in labels if not 0 <= y < len(names)]
    if wrong:
        raise DataError(
            "labels outside the classes",
            where=f"{name}, column {column}",
            found=f"{len(wrong)} such as {wrong[0]} (an unlabelled split?)",
            fix="leave that split out",
        )
    if not bounds[2]:
        # Only what is missing is drawn; a validation split that was brought stays as it is.
        shares = (0.8,) if bounds[1] else (0.7, 0.1)
        drawn = split_by_class([labels[i] for i in bounds[0]], shares, SPLIT_SEED)
        bounds = [drawn[0], bounds[1], drawn[1]] if bounds[1] else drawn
    return _Pool(images, labels, bounds, names).to_data(Path(name).name, preprocessing, options)


def _list_pictures(part: Any, column: str) -> list[Any]:
    """The images of a Hugging Face split as files or bytes, to be read as all others are."""
    hf = require("datasets", "datasets", "a Hugging Face data set")
    feature = part.features[column]
    if not isinstance(feature, hf.Image):
        # Numbers: arrays of pixels.
        return [each if isinstance(each, bytes) else np.asarray(each) for each in part[column]]
    rows = part.cast_column(column, hf.Image(decode=False))[column]
    # The path of bytes is where they once were.
    return [row and (row["path"] if row["bytes"] is None else row["bytes"]) for row in rows]
