"""Depth maps: a folder `depth/` beside `images/`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from restuning._errors import DataError
from restuning.backbones.images import read_depth
from restuning.data.data import Data, DataOptions
from restuning.data.listing import NO_PAIR_OF_DEPTH
from restuning.data.pixels import PixelTargets, from_pixels
from restuning.problems import Depth

if TYPE_CHECKING:
    from restuning.backbones import Preprocessing


class Depths(PixelTargets):
    """Depth maps in PNG of 16 bits or as arrays of floats, 0 or NaN where nothing is known.

    Args:
        name: What the number is called.
    """

    kind = Depth.kind
    folder = "depth"
    suffixes = (".png", ".npy")
    noun = "depth map"
    asks = "a number of every pixel"
    unpaired = NO_PAIR_OF_DEPTH

    def __init__(self, name: str = "depth") -> None:
        self.name = name

    @property
    def labels(self) -> list[str]:
        """The name of the number."""
        return [self.name]

    def read(self, source: Any, name: str = "") -> Image.Image:
        """See `read_depth`."""
        return read_depth(source, name)

    def fit(self, target: Image.Image, preprocessing: Preprocessing) -> Tensor:
        """In float32; 0 where nothing is known."""
        return preprocessing.depth(target)

    def summarise(self, numbers: np.ndarray) -> tuple[float, float] | None:
        """The means of the known numbers and of their squares; None where there are none."""
        known = numbers[numbers > 0].astype(np.float64)
        return (float(known.mean()), float(np.square(known).mean())) if known.size else None

    def make_problem(self, summaries: Sequence[Any], window: tuple[int, int], where: str) -> Depth:
        """Numbers, scaled as those of training are.

        Raises:
            DataError: No pixel is known.
        """
        moments = [each for each in summaries if each is not None]
        if not moments:
            raise DataError(
                "depth maps of which nothing is known",
                where=where,
                found=f"0 or NaN in all pixels of {len(summaries)} training images",
                fix="check them: a pixel is its number, in any unit",
            )
        return Depth.of(moments, window)


def from_depths(path: Path, preprocessing: Preprocessing, options: DataOptions) -> Data:
    """A folder of images and depth maps; see `load_data` and `from_pixels`."""
    return from_pixels(path, Depths, Depths, preprocessing, options)
