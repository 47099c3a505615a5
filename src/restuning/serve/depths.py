"""Depths as files and pictures: arrays, PNG of 16 bits, and colours with a scale."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from restuning.backbones.images import read_depth
from restuning.problems import DepthAnswer
from restuning.problems.palette import SHADES, make_shades, share_of, to_shades

STEPS = 65535
"""Of a PNG of 16 bits, from the least number, which is 1, to the most."""
BAR, LINE = 10, 16
"""Pixels of the scale under a picture and of the words under that."""


class Packed(NamedTuple):
    """A depth as a PNG of 16 bits.

    Attributes:
        png: Its bytes; 0 is a pixel without an answer.
        least, most: The numbers that 1 and 65535 stand for, with all others between them.
    """

    png: bytes
    least: float
    most: float


def to_array(answer: DepthAnswer) -> bytes:
    """The bytes of a `.npy` file: float32 in units, NaN where there is no answer."""
    stream = io.BytesIO()
    np.save(stream, answer.depth.numpy(), allow_pickle=False)
    return stream.getvalue()


def pack(answer: DepthAnswer) -> Packed:
    """In 16 bits: off by less than a 65000th of what lies between the least and the most."""
    least, _, most = answer.spread or (0.0, 0.0, 0.0)
    steps = 1 + share_of(answer.depth, least, most) * (STEPS - 1)
    numbers = torch.where(answer.depth.isfinite(), steps.round(), 0).numpy().astype(np.uint16)
    return Packed(_to_png(Image.fromarray(numbers)), least, most)


def unpack(packed: Packed) -> Tensor:
    """The depth of a PNG of 16 bits, `H W`; NaN where there is no answer."""
    steps = torch.from_numpy(np.array(read_depth(packed.png)))
    values = packed.least + (steps - 1) / (STEPS - 1) * (packed.most - packed.least)
    return torch.where(steps > 0, values, torch.nan)


def to_image(answer: DepthAnswer) -> Image.Image:
    """A picture with a palette: dark is the least number of the image, bright the most, grey no answer."""
    least, _, most = answer.spread or (0.0, 0.0, 0.0)
    made = Image.fromarray(to_shades(answer.depth, least, most).numpy().astype(np.uint8))
    made.putpalette(make_shades())
    return made


def to_png(answer: DepthAnswer) -> bytes:
    """The bytes of a file of `to_image`."""
    return _to_png(to_image(answer))


def with_scale(answer: DepthAnswer) -> Image.Image:
    """The picture, and under it the scale with its ends in units."""
    picture = to_image(answer).convert("RGB")
    width, height = picture.size
    made = Image.new("RGB", (width, height + BAR + LINE), "white")
    made.paste(picture)
    shades = np.linspace(0, SHADES - 1, width).round().astype(np.uint8)
    bar = Image.fromarray(np.tile(shades, (BAR, 1)))
    bar.putpalette(make_shades())
    made.paste(bar.convert("RGB"), (0, height))
    if answer.spread is not None:
        least, _, most = (f"{value:.4g}" for value in answer.spread)
        pen, font = ImageDraw.Draw(made), ImageFont.load_default(LINE - 5)
        at = height + BAR + 1
        pen.text((1, at), least, "black", font)
        # Of a narrow picture the right end alone would lie over the left one.
        if width > font.getlength(least) + font.getlength(most) + 8:
            pen.text((width - 1, at), most, "black", font, "ra")
    return made


def _to_png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return stream.getvalue()
