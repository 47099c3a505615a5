"""Images larger than those of training, as overlapping windows whose answers are blended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from restuning._errors import DataError
from restuning.backbones import Preprocessing
from restuning.problems import OfPixels, Problem
from restuning.problems.answers import join_windows
from restuning.problems.problem import Box

OVERLAP = 4
"""Neighbouring windows share at least one such part of their side."""


@dataclass(frozen=True)
class Tiles:
    """How images are cut for some tasks.

    Attributes:
        window: Height and width of a window, in the pixels of an image.
        tasks: Names of those that answer pixels, and are asked about windows.
        others: Whether there are others, which are asked about the whole.
    """

    window: tuple[int, int]
    tasks: frozenset[str]
    others: bool

    @classmethod
    def of(
        cls, problems: Mapping[str, Problem], said: bool | int, preprocessing: Preprocessing
    ) -> Tiles:
        """Of some tasks.

        Args:
            problems: By task.
            said: Side of a window; True for what the training images were.
            preprocessing: How images become the backbone's.

        Raises:
            DataError: No task answers pixels, nothing says how large a window is, tasks say it differently, or images are
                cropped.
        """
        of_pixels = {name: p for name, p in problems.items() if isinstance(p, OfPixels)}
        if not of_pixels:
            raise DataError(
                "windows of an image are for tasks that answer its pixels",
                where="tiles",
                found=", ".join(f"{name}: {p.kind}" for name, p in problems.items())[:200],
                fix="leave tiles out",
            )
        if preprocessing != preprocessing.whole():
            raise DataError(
                "windows are seen whole, and this task crops its images",
                where="tiles",
                found=f"crop {preprocessing.crop:g}",
                fix="train on a folder or a table, or with --whole",
            )
        windows = {each.window for each in of_pixels.values()}
        if said is not True and said < 1:
            raise DataError(
                "a window without pixels", where="tiles", found=f"{said}", fix="give 1 or more"
            )
        if said is not True:
            windows = {(said, said)}
        if len(windows) > 1 or None in windows:
            told = (f"{name}: {each.window}" for name, each in of_pixels.items())
            raise DataError(
                "how large is a window?",
                where="tiles",
                found=f"height and width of training images, {', '.join(told)}"[:200],
                fix="say its side in pixels of the image: --window PIXELS (tiles=PIXELS)",
            )
        (window,) = windows
        assert window is not None
        return cls((window[0], window[1]), frozenset(of_pixels), len(of_pixels) < len(problems))

    def place(self, size: tuple[int, int]) -> list[Box]:
        """The parts of an image that the backbone is shown: windows, row by row; first the whole, where a task wants that.

        An image that is no larger than a window is one; along a side that is shorter a window is as long as the image.

        Args:
            size: Height and width.
        """
        rows, columns = (
            _place_along(pixels, side) for pixels, side in zip(size, self.window, strict=True)
        )
        boxes = [(left, top, right, bottom) for top, bottom in rows for left, right in columns]
        whole = (0, 0, size[1], size[0])
        return [whole, *boxes] if self.others and boxes != [whole] else boxes

    def join(
        self, answers: Sequence[Mapping[str, Any]], boxes: Sequence[Box], size: tuple[int, int]
    ) -> dict[str, Any]:
        """What all tasks say of an image.

        Args:
            answers: By task, to each of its parts.
            boxes: Of `place`.
            size: Height and width of the image.
        """
        skipped = int(self.others and len(boxes) > 1)
        corners = [(left, top) for left, top, _, _ in boxes[skipped:]]
        found = dict(answers[0])
        for name in self.tasks & found.keys():
            found[name] = join_windows([each[name] for each in answers[skipped:]], corners, size)
        return found


def _place_along(pixels: int, side: int) -> list[tuple[int, int]]:
    """Begin and end of windows along one side, evenly, the first and the last at its ends."""
    if pixels <= side:
        return [(0, pixels)]
    step = max(1, side - -(-side // OVERLAP))
    count = 1 + -(-(pixels - side) // step)
    starts = [round(k * (pixels - side) / (count - 1)) for k in range(count)]
    return [(start, start + side) for start in starts]
