"""How an image becomes a backbone's input, as data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from restuning._errors import FormatError, UnknownNameError

_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}


@dataclass(frozen=True)
class Preprocessing:
    """Resize, centre crop, normalise.

    Attributes:
        size: Height and width in pixels.
        mean, std: Per channel, of values in 0..1.
        interpolation: "bicubic", "bilinear" or "nearest".
        crop: Share of the resized image that the centre crop keeps.
        squash: Resize the whole image to `size`, whatever its shape, and crop nothing (SigLIP).
    """

    size: tuple[int, int]
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    interpolation: str = "bicubic"
    crop: float = 1.0
    squash: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As JSON, for a task file."""
        values = asdict(self)
        # Only where it is so: files and stores of before it stay what they are.
        return values if self.squash else {k: v for k, v in values.items() if k != "squash"}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """From a task file.

        Raises:
            FormatError: A field is missing or of another kind.
        """
        try:
            mean: tuple[float, ...] = tuple(float(v) for v in values["mean"])
            std: tuple[float, ...] = tuple(float(v) for v in values["std"])
            made = cls(
                (int(values["size"][0]), int(values["size"][1])),
                mean,
                std,
                str(values["interpolation"]),
                float(values["crop"]),
                values.get("squash", False),
            )
            if (
                not isinstance(made.squash, bool)
                or made.interpolation not in _FILTERS
                or not 0 < made.crop <= 1
                or min(made.size) < 1
                or len(made.mean) != 3
                or len(made.std) != 3
                or not all(s > 0 for s in made.std)
            ):
                raise ValueError(str(dict(values))[:200])
            return made
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise FormatError(
                "the preprocessing of a task is malformed",
                found=f"{type(error).__name__}: {error}",
                fix="restore task.json from where it was saved",
            ) from None

    def image(self, image: Image.Image) -> Tensor:
        """One image as `3 h w`, normalised."""
        return self.normalise(self.resize_and_crop(image))

    def resize_and_crop(self, image: Image.Image) -> Tensor:
        """One image as `3 h w`, resized and cropped, bytes."""
        image = image.convert("RGB")
        height, width = self.size
        # The centre crop is what is left of a larger image, so that is what is resized to.
        # Sizes and corners are rounded as timm rounds them: its weights were trained so.
        to = math.floor(height / self.crop), math.floor(width / self.crop)
        if self.squash:
            resized = width, height
        elif height == width:
            # The shorter side is given, the longer follows.
            short = min(image.size)
            width_to, height_to = (
                to[0] if s == short else int(to[0] * s / short) for s in image.size
            )
            resized = width_to, height_to
        else:
            # Enough of both sides to crop from.
            scale = max(to[0] / image.height, to[1] / image.width)
            resized = round(image.width * scale), round(image.height * scale)
        if image.size != resized:
            image = image.resize(resized, _FILTERS[self.interpolation])
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        image = image.crop((left, top, left + width, top + height))
        # A copy: Pillow's own memory is read-only, of which torch warns.
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Bytes `*b 3 h w` to normalised floats."""
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std

    def transform(self, policy: str) -> Callable[[Image.Image], Tensor]:
        """Image to tensor, with an augmentation for training.

        Args:
            policy: "none", "flip" (horizontal, probability 0.5), "timm" (random resized crop,
                flip, colour jitter) or "timm:POLICY" (e.g. `timm:rand-m9-mstd0.5`).
        """
        if policy == "none":
            return self.image
        if policy == "flip":
            return _Flip(self)
        if policy != "timm" and not policy.startswith("timm:"):
            raise UnknownNameError(
                "no such augmentation", where=policy, fix="none, flip, timm or timm:POLICY"
            )
        return _TimmAugmentation(self, policy.partition(":")[2])


@dataclass(frozen=True)
class _Flip:
    """The image or its mirror image. A class and not a closure: worker processes are sent it."""

    preprocessing: Preprocessing

    def __call__(self, image: Image.Image) -> Tensor:
        tensor = self.preprocessing.image(image)
        return tensor.flip(-1) if torch.rand(()) < 0.5 else tensor


@dataclass
class _TimmAugmentation:
    """timm's transform for training, under an automatic policy or none ("").

    A worker process is sent its name and makes it again: some of timm's parts are closures.
    """

    preprocessing: Preprocessing
    policy: str

    def __post_init__(self) -> None:
        # Imported here: only training needs it, and it takes a second.
        from timm.data import create_transform

        form = self.preprocessing
        try:
            self._transform: Any = create_transform(
                (3, *form.size),
                is_training=True,
                interpolation=form.interpolation,
                mean=form.mean,
                std=form.std,
                auto_augment=self.policy or None,
            )
        except (AssertionError, ValueError, KeyError, IndexError) as error:
            raise UnknownNameError(
                "timm has no such augmentation policy",
                where=f"timm:{self.policy}",
                found=str(error)[:200],
                fix="e.g. timm:rand-m9-mstd0.5 or timm:augmix-m5-w4-d2",
            ) from None

    def __call__(self, image: Image.Image) -> Tensor:
        return self._transform(image.convert("RGB"))

    def __reduce__(self) -> tuple:
        return _TimmAugmentation, (self.preprocessing, self.policy)
