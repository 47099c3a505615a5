"""How an image becomes a backbone's input, as data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from restuning._errors import MALFORMED, DataError, FormatError, UnknownNameError
from restuning.backbones.images import Least, is_read, read_image, scaled_from

_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}

KEPT = 2
"""How many times as large as what it is resized to an image is still decoded: resizing it averages as it would the whole."""

LARGEST_SIDE = 2**14
"""Pixels that an image is resized to at most, where a file says so."""


@dataclass(frozen=True)
class Preprocessing:
    """Resize, centre crop, normalise.

    Attributes:
        size: Height and width in pixels.
        mean, std: Per channel, of values in 0..1.
        interpolation: "bicubic", "bilinear", "nearest", "lanczos", "box" or "hamming".
        crop: Share of the resized image that the centre crop keeps.
        squash: Resize the whole image to `size`, whatever its shape, and crop nothing (SigLIP).
        resize: What an image is resized to before the centre crop, in place of what `crop` says:
            `(n,)` its shorter side to n pixels, `(h, w)` the whole of it, `()` it is left as it is.
            Corners are rounded as transformers rounds them. Black is added where it is too small.
        bgr: Blue goes first; mean and deviation are then in that order.
        scaled_jpeg: JPEG files are decoded to 1/2, 1/4 or 1/8 of their sides, where that leaves `KEPT` times what they
            are resized to: sooner, and with slightly other pixels.
    """

    size: tuple[int, int]
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    interpolation: str = "bicubic"
    crop: float = 1.0
    squash: bool = False
    resize: tuple[int, ...] | None = None
    bgr: bool = False
    scaled_jpeg: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As JSON, for a task file."""
        # Only where it is so: files and stores of before these fields stay what they are.
        usual = {"squash": False, "resize": None, "bgr": False, "scaled_jpeg": False}
        return {k: v for k, v in asdict(self).items() if k not in usual or v != usual[k]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """From a task file.

        Raises:
            FormatError: A field is missing or of another kind.
        """
        try:
            mean: tuple[float, ...] = tuple(float(v) for v in values["mean"])
            std: tuple[float, ...] = tuple(float(v) for v in values["std"])
            resize = values.get("resize")
            made = cls(
                (int(values["size"][0]), int(values["size"][1])),
                mean,
                std,
                str(values["interpolation"]),
                float(values["crop"]),
                values.get("squash", False),
                None if resize is None else tuple(int(v) for v in resize),
                values.get("bgr", False),
                values.get("scaled_jpeg", False),
            )
            if (
                not isinstance(made.squash, bool)
                or not isinstance(made.bgr, bool)
                or not isinstance(made.scaled_jpeg, bool)
                or len(made.resize or ()) > 2
                or min(made.resize or (1,)) < 1
                or made.interpolation not in _FILTERS
                or not 0 < made.crop <= 1
                or min(made.size) < 1
                or max(made.size) / made.crop > LARGEST_SIDE
                or len(made.mean) != 3
                or len(made.std) != 3
                or not all(s > 0 for s in made.std)
                or not all(map(math.isfinite, (*made.mean, *made.std)))
            ):
                raise ValueError(str(dict(values))[:200])
            return made
        except MALFORMED as error:
            raise FormatError(
                "the preprocessing of a task is malformed",
                found=f"{type(error).__name__}: {error}",
                fix="restore task.json from where it was saved",
            ) from None

    @property
    def byte_mean(self) -> tuple[float, ...]:
        """The mean in RGB and within 0..1, whatever the order and unit of the numbers."""
        mean = self.mean[::-1] if self.bgr else self.mean
        return tuple(min(max(m, 0.0), 1.0) for m in mean)

    def image(self, image: Image.Image) -> Tensor:
        """One image of any mode as `3 h w`, normalised; it is read as `restuning.data.read_image` reads it."""
        return self.normalise(self.resize_and_crop(image))

    def resize_and_crop(self, image: Image.Image) -> Tensor:
        """One image as `3 h w`, resized and cropped, bytes."""
        image = self._fit(_as_read(image), _FILTERS[self.interpolation])
        # A copy: Pillow's own memory is read-only, of which torch warns.
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def mask(self, mask: Image.Image) -> Tensor:
        """A mask of class numbers (`read_mask`) as `h w` in uint8, resized and cropped as its image is; 255 where nothing is.

        To the nearest pixel: between two classes lies no third.
        """
        # Pillow adds zeros where an image is too small. One more of each makes that 255, which comes back as it was.
        shifted = Image.fromarray(np.asarray(mask) + np.uint8(1))
        fitted = self._fit(shifted, Image.Resampling.NEAREST)
        return torch.from_numpy(np.array(fitted) - np.uint8(1))

    def depth(self, depth: Image.Image) -> Tensor:
        """A depth map (`read_depth`) as `h w` in float32, resized and cropped as its image is; 0 where nothing is.

        To the nearest pixel: between two distances, and between one and none, lies no third.
        """
        return torch.from_numpy(np.array(self._fit(depth, Image.Resampling.NEAREST)))

    def whole(self) -> Preprocessing:
        """The same for the whole of every image, whatever its shape, with nothing cut off."""
        return replace(self, squash=True, crop=1.0, resize=None)

    @property
    def least(self) -> Least | None:
        """What `read_image` has to leave of an image for it; None for all of it."""
        return self._least if self.scaled_jpeg else None

    def _least(self, width: int, height: int) -> tuple[int, int]:
        (wide, high), _ = self._place(width, height)
        return KEPT * wide, KEPT * high

    def seen(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of what is left of an image, in its own pixels; beyond it where black is added."""
        resized, corner = self._place(width, height)
        (x, y), (h, w) = (s / r for s, r in zip((width, height), resized, strict=True)), self.size
        left, top = corner
        return round(left * x), round(top * y), round((left + w) * x), round((top + h) * y)

    def _fit(self, image: Image.Image, how: Image.Resampling) -> Image.Image:
        size, box = scaled_from(image)
        resized, (left, top) = self._place(*size)
        if size != image.size:
            image = image.resize(resized, how, box)
        elif image.size != resized:
            image = image.resize(resized, how)
        height, width = self.size
        return image.crop((left, top, left + width, top + height))

    def _place(self, width_from: int, height_from: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Width and height that an image is resized to, and the corner from which it is cropped."""
        height, width = self.size
        if self.resize is not None:
            return self._place_as_said(width_from, height_from, self.resize)
        # The centre crop is what is left of a larger image, so that is what is resized to.
        # Sizes and corners are rounded as timm rounds them: its weights were trained so.
        to = math.floor(height / self.crop), math.floor(width / self.crop)
        if self.squash:
            resized = width, height
        elif height == width:
            # The shorter side is given, the longer follows.
            short = min(width_from, height_from)
            width_to, height_to = (
                to[0] if s == short else int(to[0] * s / short) for s in (width_from, height_from)
            )
            resized = width_to, height_to
        else:
            # Enough of both sides to crop from.
            scale = max(to[0] / height_from, to[1] / width_from)
            resized = round(width_from * scale), round(height_from * scale)
        return resized, (round((resized[0] - width) / 2), round((resized[1] - height) / 2))

    def _place_as_said(
        self, width_from: int, height_from: int, resize: tuple[int, ...]
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        height, width = self.size
        if len(resize) == 1:
            short = min(width_from, height_from)
            resize = tuple(
                resize[0] if s == short else int(resize[0] * s / short)
                for s in (height_from, width_from)
            )
        height_to, width_to = resize or (height_from, width_from)
        # Towards zero, also where the image is smaller.
        corner = int((width_to - width) / 2), int((height_to - height) / 2)
        return (width_to, height_to), corner

    def normalise(self, pixels: Tensor) -> Tensor:
        """Bytes `*b 3 h w` to normalised floats."""
        pixels = pixels.flip(-3) if self.bgr else pixels
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std

    def transform(self, policy: str) -> Callable[[Image.Image], Tensor]:
        """Image to tensor, with an augmentation for training.

        Args:
            policy: "none", "flip" (horizontal, probability 0.5), "timm" (random resized crop,
                flip, colour jitter) or "timm:POLICY" (e.g. `timm:rand-m9-mstd0.5`).

        Raises:
            DataError: Crops of random sizes are asked of images that are decoded scaled.
            UnknownNameError: No such augmentation.
        """
        if policy == "none":
            return self.image
        if policy == "flip":
            return _Flip(self)
        if policy != "timm" and not policy.startswith("timm:"):
            raise UnknownNameError(
                "no such augmentation", where=policy, fix="none, flip, timm or timm:POLICY"
            )
        if self.scaled_jpeg:
            raise DataError(
                "crops of random sizes would enlarge images that are decoded scaled",
                where=f"augment={policy}",
                found="scaled_jpeg",
                fix="leave --scaled-jpeg out, or augment by flip",
            )
        return _TimmAugmentation(self, policy.partition(":")[2])


def least_for(transform: Any) -> Least | None:
    """What `read_image` has to leave of an image for a transform of `Preprocessing`; None for all of it, and of any other."""
    own = getattr(transform, "__self__", None) or getattr(transform, "preprocessing", None)
    return own.least if isinstance(own, Preprocessing) else None


def _as_read(image: Image.Image) -> Image.Image:
    """As `read_image` reads it, where that has not been done."""
    return image if is_read(image) else read_image(image)


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
                # Of what is filled in where a picture is turned or moved.
                mean=form.byte_mean,
                # Bytes: numbers are made of them as everywhere else.
                normalize=False,
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
        return self.preprocessing.normalise(self._transform(_as_read(image)))

    def __reduce__(self) -> tuple:
        return _TimmAugmentation, (self.preprocessing, self.policy)
