"""Masks as pictures: PNG whose pixels are class numbers, in colours; and laid over their image."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from restuning._errors import WrongTaskError
from restuning.backbones.images import read_mask
from restuning.problems import UNLABELLED, MaskAnswer
from restuning.problems.palette import make_palette, name_colours


def to_image(answer: MaskAnswer) -> Image.Image:
    """A mask with a palette: its pixels are class numbers, 255 where there is no answer.

    Raises:
        WrongTaskError: It has more classes than a palette has colours.
    """
    if len(answer.labels) > UNLABELLED:
        raise WrongTaskError(
            "a mask of so many classes is no picture with a palette",
            found=f"{len(answer.labels)} classes",
            fix="take the numbers in Python: answer.mask",
        )
    numbers = answer.mask.where(answer.mask != answer.ignore, UNLABELLED).to(torch.uint8)
    made = Image.fromarray(numbers.numpy())
    made.putpalette(make_palette())
    return made


def to_png(answer: MaskAnswer) -> bytes:
    """The bytes of a file."""
    stream = io.BytesIO()
    to_image(answer).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def find_colours(answer: MaskAnswer) -> list[str]:
    """The colours of its `shares`, in their order, as `#rrggbb`."""
    names = [str(label) for label in answer.labels]
    colours = dict(zip(names, name_colours(len(names)), strict=False))
    return [colours[share.label] for share in answer.shares if share.label in colours]


def from_png(content: bytes) -> Tensor:
    """The class numbers of such a file, `H W`."""
    return torch.from_numpy(np.array(read_mask(content)))


def lay_over(image: Image.Image, answer: MaskAnswer, strength: float = 0.5) -> Image.Image:
    """The image with its classes in their colours over it; pixels without an answer stay as they are.

    Args:
        image: As `read_image` gives it, in the size of the mask.
        answer: Of this image.
        strength: Of the colours, from 0 to 1.
    """
    mixed = Image.blend(image, to_image(answer).convert("RGB"), strength)
    there = Image.fromarray(((answer.mask != answer.ignore).numpy() * 255).astype(np.uint8))
    return Image.composite(mixed, image, there)
