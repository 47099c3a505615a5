"""Common corruptions of images as bytes, in five severities.

The kinds and numbers of ImageNet-C (Hendrycks and Dietterich 2019, arXiv 1903.12261) that need no
files: three noises, blur, brightness, contrast, pixels and JPEG. Lengths are those of 224 pixels
and scale with the image.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image
from torch import Tensor

from restuning._errors import UnknownNameError

SEVERITIES = (1, 2, 3, 4, 5)
REFERENCE = 224
"""Pixels that the lengths below are meant for."""

GAUSSIAN = (0.08, 0.12, 0.18, 0.26, 0.38)
SHOT = (60.0, 25.0, 12.0, 5.0, 3.0)
IMPULSE = (0.03, 0.06, 0.09, 0.17, 0.27)
BLUR = (1.0, 2.0, 3.0, 4.0, 6.0)
BRIGHTER = (0.1, 0.2, 0.3, 0.4, 0.5)
CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)
PIXELS = (0.6, 0.5, 0.4, 0.3, 0.25)
JPEG = (25, 18, 15, 10, 7)


def corrupt(pixels: Tensor, kind: str, severity: int, seed: int = 0) -> Tensor:
    """Images under a corruption, the same for the same seed.

    Args:
        pixels: `n 3 h w`, bytes.
        kind: A name of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: Of the noise.

    Raises:
        UnknownNameError: No such kind or severity.
    """
    if kind not in CORRUPTIONS or severity not in SEVERITIES:
        raise UnknownNameError(
            "no such corruption",
            where=f"{kind} {severity}",
            fix=f"one of: {', '.join(CORRUPTIONS)}; severity 1 to 5",
        )
    # Every method meets the same noise.
    generator = torch.Generator().manual_seed(seed)
    return CORRUPTIONS[kind](pixels, severity - 1, generator)


def _bytes(values: Tensor) -> Tensor:
    return (values.clamp(0, 1) * 255).round().to(torch.uint8)


def _gaussian(pixels: Tensor, at: int, generator: torch.Generator) -> Tensor:
    x = pixels.float() / 255
    return _bytes(x + GAUSSIAN[at] * torch.randn(x.shape, generator=generator))


def _shot(pixels: Tensor, at: int, generator: torch.Generator) -> Tensor:
    return _bytes(torch.poisson(pixels.float() / 255 * SHOT[at], generator) / SHOT[at])


def _impulse(pixels: Tensor, at: int, generator: torch.Generator) -> Tensor:
    drawn = torch.rand(pixels.shape, generator=generator)
    x = pixels.clone()
    # Half salt, half pepper, of one draw: no value is both.
    x[drawn < IMPULSE[at] / 2] = 0
    x[drawn > 1 - IMPULSE[at] / 2] = 255
    return x


def _blur(pixels: Tensor, at: int, generator: torch.Generator) -> Tensor:
    # Deviations are told for 224 pixels: a smaller image is blurred by as much of its width.
    sigma = BLUR[at] * pixels.shape[-1] / REFERENCE
    # All but 0.3 % of a Gaussian lies within three deviations, less than one level of a byte.
    reach = max(1, round(3 * sigma))
    line = torch.exp(-(torch.arange(-reach, reach + 1).float() ** 2) / (2 * sigma**2))
    line = (line / line.sum()).expand(3, 1, -1)
    x = F.pad(pixels.float() / 255, (reach, reach, reach, reach), mode="replicate")
    # Separable: rows, then columns, each channel by itself.
    x = F.conv2d(x, line.unsqueeze(2), groups=3)
    return _bytes(F.conv2d(x, line.unsqueeze(3), groups=3))


def _brightness(pixels: Tensor, at: int, generator: torch.Generator) -> Tensor:
    return _bytes(pixels.float() / 255 + BRIGHTER[at])


def _contrast(pixels: Tensor, at: int, generator: torch.Generator) -> Tensor:
    x = pixels.float() / 255
    mean = x.mean((-2, -1), keepdim=True)
    return _bytes(mean + CONTRAST[at] * (x - mean))


def _pixelate(pixels: Tensor, at: int, generator: torch.Generator) -> Tensor:
    x = pixels.float() / 255
    size = [max(1, round(side * PIXELS[at])) for side in x.shape[-2:]]
    # Area and nearest: blocks of mean colour with hard edges.
    small = F.interpolate(x, size, mode="area")
    return _bytes(F.interpolate(small, x.shape[-2:], mode="nearest"))


def _jpeg(pixels: Tensor, at: int, generator: torch.Generator) -> Tensor:
    decoded = []
    for image in pixels:
        stream = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(stream, "jpeg", quality=JPEG[at])
        decoded.append(np.array(Image.open(stream)))
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2)


CORRUPTIONS: dict[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    "gaussian_noise": _gaussian,
    "shot_noise": _shot,
    "impulse_noise": _impulse,
    "gaussian_blur": _blur,
    "brightness": _brightness,
    "contrast": _contrast,
    "pixelate": _pixelate,
    "jpeg": _jpeg,
}
