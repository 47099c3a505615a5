"""Masks of classes: a folder `masks/` beside `images/`, and a file `classes.txt`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from restuning._errors import DataError
from restuning._files import expand_home
from restuning.backbones.images import read_mask
from restuning.data.data import Data, DataOptions
from restuning.data.labels import warn_of_look_alikes, warn_of_unjudged, warn_of_untrained
from restuning.data.listing import NO_PAIR
from restuning.data.pixels import PixelTargets, from_pixels
from restuning.data.text_files import read_text, split_lines
from restuning.problems import UNLABELLED, Segmentation

if TYPE_CHECKING:
    from restuning.backbones import Preprocessing

CLASSES = "classes.txt"
"""Of the layout."""


class Masks(PixelTargets):
    """Masks in PNG, whose pixels are numbers of classes.

    Args:
        classes: Their names, in the order of their numbers.
    """

    kind = Segmentation.kind
    folder = "masks"
    suffixes = (".png",)
    noun = "mask"
    asks = "a class of every pixel"
    unpaired = NO_PAIR

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = list(classes)

    @property
    def labels(self) -> list[str]:
        """The classes."""
        return self.classes

    def key(self) -> Any:
        """Their number."""
        return self.kind, len(self.classes)

    def read(self, source: Any, name: str = "") -> Image.Image:
        """See `read_mask`."""
        return read_mask(source, name)

    def check(self, numbers: np.ndarray, name: str) -> None:
        """Refuse a class that has no name.

        Raises:
            DataError: One is there.
        """
        beyond = (numbers >= len(self.classes)) & (numbers != UNLABELLED)
        if beyond.any():
            y, x = (int(each[0]) for each in beyond.nonzero())
            raise DataError(
                f"a mask has a class that {CLASSES} does not name",
                where=name,
                found=f"{numbers[y, x]} at row {y}, column {x}; {len(self.classes)} classes "
                f"(0 to {len(self.classes) - 1})",
                fix=f"name it, or write {UNLABELLED} where there is no class",
            )

    def fit(self, target: Image.Image, preprocessing: Preprocessing) -> Tensor:
        """In uint8; 255 where nothing is."""
        return preprocessing.mask(target)

    def summarise(self, numbers: np.ndarray) -> set[int]:
        """The classes that are there."""
        return set(np.unique(numbers).tolist()) - {UNLABELLED}

    def look_at_splits(self, summaries: Mapping[str, Sequence[Any]], where: str) -> None:
        """Tell of classes that a split has no example of."""
        there = {split: set().union(*own) for split, own in summaries.items()}
        warn_of_unjudged(self.classes, there, where)

    def make_problem(
        self, summaries: Sequence[Any], window: tuple[int, int], where: str
    ) -> Segmentation:
        """A segmentation.

        Raises:
            DataError: There are fewer than two classes.
        """
        trained = set().union(*summaries)
        if len(trained) < 2:
            raise DataError(
                "masks of one class teach nothing",
                where=where,
                found=f"{', '.join(self.classes[y] for y in trained) or 'no class'} in all training masks",
                fix="check the masks: their pixels are the numbers of classes",
            )
        warn_of_untrained(self.classes, trained, where)
        return Segmentation(window=window)


def from_masks(path: Path, preprocessing: Preprocessing, options: DataOptions) -> Data:
    """A folder of images and masks; see `load_data` and `from_pixels`.

    Raises:
        DataError: As `from_pixels`, or a class of a mask is not in `classes.txt`.
    """

    def make() -> Masks:
        return Masks(find_classes(options.classes, path))

    return from_pixels(path, Masks, make, preprocessing, options)


def find_classes(said: str | Path | Sequence[str] | None, folder: Path | None) -> list[str]:
    """Names of the classes of masks: those that were said, those of a file, or of `classes.txt` in a folder.

    Raises:
        DataError: There are none, or they are malformed.
    """
    if isinstance(said, str | Path):
        return _read_classes(expand_home(said))
    if said is not None:
        return _check_classes(list(map(str, said)), "classes")
    if folder is None:
        raise DataError(
            "masks need the names of their classes",
            where="classes",
            found="none, and no folder to look for them in",
            fix="give classes=[...], or a file of them",
        )
    return _read_classes(folder / CLASSES)


def no_masks(where: str, options: DataOptions) -> DataError:
    """The error of names of classes that are given for data without masks."""
    return DataError(
        "names of classes are given for masks, and there are none",
        where=where,
        found=f"classes {str(options.classes)[:80]}",
        fix="leave --classes out",
    )


def _read_classes(file: Path) -> list[str]:
    if not file.is_file():
        raise DataError(
            "masks need the names of their classes",
            where=str(file),
            found="no such file",
            fix="write a name a line: that of class 0 first; or name another file with --classes",
        )
    names = [line.strip() for line in split_lines(read_text(file))]
    while names and not names[-1]:
        names.pop()
    return _check_classes(names, str(file))


def _check_classes(names: list[str], where: str) -> list[str]:
    if not 2 <= len(names) <= UNLABELLED or not all(names) or len(set(names)) < len(names):
        raise DataError(
            "the names of classes are malformed",
            where=where,
            found=f"{len(names)} lines, {names.count('')} of them empty, {len(set(names))} names",
            fix=f"write 2 to {UNLABELLED} names, each once, a line each",
        )
    warn_of_look_alikes(names, where)
    return names
