"""Colours of classes and of numbers in pictures."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

MOST_CLASSES = 256
"""Of a palette; the last colour is of pixels without an answer."""
BITS = 8

COLOURS = "viridis"
"""matplotlib's map whose colours are as far apart as the numbers are, also in grey."""
SHADES = 255
"""Of the map in a picture; the last colour of its palette is of pixels without a number."""
NO_NUMBER = (128, 128, 128)


def make_palette() -> list[int]:
    """Red, green and blue of 256 classes as Pascal VOC colours them: neighbours differ much, and 0 is black."""
    numbers = np.arange(MOST_CLASSES)
    colours = np.zeros((MOST_CLASSES, 3), int)
    # Every third bit of a number goes to one colour, the lowest to its highest.
    for place in range(BITS):
        bit = (numbers >> place) & 1
        colours[:, place % 3] |= bit << (BITS - 1 - place // 3)
    return colours.ravel().tolist()


def name_colours(classes: int) -> list[str]:
    """The colour of each class as `#rrggbb`; empty of more than a palette has."""
    if classes >= MOST_CLASSES:
        return []
    palette = bytes(make_palette())
    return [f"#{palette[3 * k : 3 * k + 3].hex()}" for k in range(classes)]


@cache
def make_shades() -> tuple[int, ...]:
    """Red, green and blue of numbers from the least to the most, and of none."""
    # Imported here: only who draws waits for it.
    from matplotlib import colormaps

    colours = colormaps[COLOURS](np.linspace(0, 1, SHADES))[:, :3]
    return (*(colours * 255).round().astype(int).ravel().tolist(), *NO_NUMBER)


def to_shades(numbers: Tensor, least: float, most: float) -> Tensor:
    """Places in `make_shades`: 0 of the least number, the last of what is none."""
    shades = (share_of(numbers, least, most) * (SHADES - 1)).round()
    return torch.where(numbers.isfinite(), shades, SHADES).long()


def share_of(numbers: Tensor, least: float, most: float) -> Tensor:
    """Of what lies between the ends, from 0 to 1; 0 where these are one."""
    return ((numbers - least) / max(most - least, 1e-30)).clamp(0, 1)
