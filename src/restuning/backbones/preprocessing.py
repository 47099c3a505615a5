"""How an image becomes a backbone's input, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from restuning._errors import FormatError

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
    """

    size: tuple[int, int]
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    interpolation: str = "bicubic"
    crop: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON, for a task file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """From a task file.

        Raises:
            FormatError: A field is missing or of another kind.
        """
        try:
            return cls(
                (int(values["size"][0]), int(values["size"][1])),
                tuple(map(float, values["mean"])),  # type: ignore[arg-type]
                tuple(map(float, values["std"])),  # type: ignore[arg-type]
                str(values["interpolation"]),
                float(values["crop"]),
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise FormatError(
                "the preprocessing of a task is malformed",
                found=f"{type(error).__name__}: {error}",
                fix="restore task.json from where it was saved",
            ) from None

    def image(self, image: Image.Image) -> Tensor:
        """One image as `3 h w`, normalised."""
        image = image.convert("RGB")
        height, width = self.size
        scale = max(height / self.crop / image.height, width / self.crop / image.width)
        resized = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
        if image.size != resized:
            image = image.resize(resized, _FILTERS[self.interpolation])
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
        return self.normalised(torch.from_numpy(np.array(image)).permute(2, 0, 1))

    def normalised(self, pixels: Tensor) -> Tensor:
        """Bytes `3 h w` to normalised floats."""
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std

    def augmented(self, policy: str) -> Callable[[Image.Image], Tensor]:
        """A training transform.

        Args:
            policy: "none", "flip" (horizontal, probability 0.5), "timm" (random resized crop,
                flip, colour jitter) or "timm:POLICY" (e.g. `timm:rand-m9-mstd0.5`).
        """
        if policy == "none":
            return self.image
        if policy == "flip":

            def flipped(image: Image.Image) -> Tensor:
                tensor = self.image(image)
                return tensor.flip(-1) if torch.rand(()) < 0.5 else tensor

            return flipped
        from timm.data import create_transform

        _, _, automatic = policy.partition(":")
        made: Any = create_transform(
            (3, *self.size), is_training=True, interpolation=self.interpolation,
            mean=self.mean, std=self.std, auto_augment=automatic or None,
        )  # fmt: skip
        return lambda image: made(image.convert("RGB"))
