"""What problems of pixels have in common: a target a pixel, logits on a coarser grid, answers that lie on their image."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from restuning._errors import TrainingError
from restuning.problems.problem import Box, Problem, refuse_arguments

PATCH = 16
"""Pixels along a patch, where only the grid of patches is known: in a forecast."""

THIN = 256
"""Places of an image, at most, by which parts of an ensemble are weighed: neighbours say the same."""


class OfPixels(Problem):
    """A target for each pixel. Targets are `b H W`; logits stand on a coarser grid, `b h w c`, and are brought to theirs bilinearly.

    Args:
        window: Median height and width of the training images, in their own pixels: what an image was that the backbone
            saw whole, and so what a window of a larger one is (`serve.tiles`). None where nobody knows.

    Raises:
        FormatError: The window has no pixels.
    """

    pool = "grid"
    # An image is hundreds of answers, and few images are all there is: larger steps are too few.
    batch_size = 8

    def __init__(self, window: Sequence[int] | None = None) -> None:
        self.window = None if window is None else tuple(window)
        if self.window is not None and (len(self.window) != 2 or min(self.window) < 1):
            raise refuse_arguments(self.kind, f"window={window}")

    @abstractmethod
    def known(self, targets: Tensor) -> Tensor:
        """Which pixels count, `b H W`."""

    def mirror(self, targets: Tensor) -> Tensor:
        """Left and right exchanged."""
        return targets.flip(-1)

    def losses_of_several(self, logits: Tensor, targets: Tensor, smoothing: Tensor) -> Tensor:
        """As `loss`, the mean over examples, of every run."""
        several = zip(logits, smoothing.flatten().tolist(), strict=True)
        return torch.stack([self.loss(own, targets, s) for own, s in several]) / len(targets)

    def as_logits(self, drawn: Tensor) -> Tensor:
        """Logits of what `blend` says of pixels, `... c`, for figures: the same, unless answers are in units."""
        return drawn

    def on_image(self, answer: Any, size: tuple[int, int], seen: Box) -> Any:
        """The answer in the image's own size."""
        return replace(answer, size=size, seen=seen)


def enlarge(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits in the size of the targets, `b h w c -> b c H W`.

    Raises:
        TrainingError: They are not of places and of pixels.
    """
    if logits.ndim != 4 or targets.ndim != 3:
        raise TrainingError(
            "logits and targets of pixels do not belong together",
            found=f"logits {tuple(logits.shape)}, targets {tuple(targets.shape)}",
            fix='pixels want a task that answers at every place: pool="grid"',
        )
    maps, size = logits.movedim(-1, 1), targets.shape[1:]
    if maps.shape[2:] == size:
        return maps
    return F.interpolate(maps, list(size), mode="bilinear", align_corners=False)


def mean_of_images(each: Tensor, known: Tensor) -> Tensor:
    """The sum over images of the mean over the pixels that count, of `b H W`; of an image without any zero."""
    counted = known.sum((1, 2)).clamp(min=1)
    return (each.sum((1, 2)) / counted).sum()


def take_middles(logits: Tensor, targets: Tensor) -> Tensor:
    """The target in the middle of each place, `b h w`."""
    sides = zip(logits.shape[1:3], targets.shape[1:], strict=True)
    down, across = (
        ((torch.arange(places, device=targets.device) + 0.5) * pixels / places).long()
        for places, pixels in sides
    )
    return targets[:, down][:, :, across]


def thin_out(rows: Tensor, images: int) -> Tensor:
    """At most `THIN` rows an image, evenly."""
    return rows[:: max(1, -(-len(rows) // (THIN * images)))]


def patches_of(logits: Tensor) -> list[int]:
    """Height and width in pixels of a grid of patches."""
    return [PATCH * side for side in logits.shape[1:3]]
