"""Images in memory: the digits that come with the package, and torchvision's data sets by name."""

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
        )


def read_digits(preprocessing: Preprocessing, options: DataOptions) -> Data:
    """The 1797 real handwritten digits of `digits/`, 8 x 8 pixels, in fixed splits."""
    with np.load(Path(__file__).parent / "digits" / "digits.npz") as raw:
        # Pixels have values from 0 to 16.
        images = [Image.fromarray((x * (255 / 16)).astype(np.uint8)) for x in raw["images"]]
        labels = raw["labels"].tolist()
    splits = split_by_class(labels, (0.5, 0.15), SPLIT_SEED)
    pool = _Pool(images, labels, splits, [str(d) for d in range(10)])
    return pool.to_data("digits", preprocessing, options)


def find_torchvision(name: str) -> Any:
    """The class of a torchvision data set.

    Raises:
        UnknownNameError: There is none of that name.
    """
    sets = require("torchvision.datasets", "transformers", f"the data set torchvision:{name}")
    cls = getattr(sets, name, None)
    if not isinstance(cls, type) or not issubclass(cls, sets.VisionDataset):
        raise UnknownNameError("torchvision has no such data set", where=name, fix="e.g. CIFAR100")
    return cls


def from_torchvision(name: str, preprocessing: Preprocessing, options: DataOptions) -> Data:
    """A torchvision data set that has been downloaded before."""
    cls = find_torchvision(name)
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
