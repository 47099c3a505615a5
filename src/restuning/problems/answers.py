"""What one task says of one input, for each kind of problem."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

NUMBERS_AT_ONCE = 2**24
"""Of an answer that is drawn, held at a time: a photograph times its classes may not fit into memory."""


class Choice(NamedTuple):
    """A class and its probability."""

    label: str
    probability: float


class Number(NamedTuple):
    """A number by its name, in its units, and how far off such answers were on rows left out.

    `error` is the root of the mean squared residual, None where nothing was held out.
    """

    label: str
    value: float
    error: float | None


@dataclass(frozen=True)
class Prediction:
    """What one task says of one input.

    Attributes:
        label: The most probable class; its number where the task has no names.
        probability: Of that class, at the task's temperature (`Task.probabilities`).
        probabilities: Of all classes, in the order of `labels`, `c` on the CPU.
        labels: Names of all classes.
    """

    label: str
    probability: float
    probabilities: Tensor = field(repr=False, compare=False)
    labels: Sequence[str] = field(repr=False, compare=False)

    def top(self, count: int = 5) -> list[Choice]:
        """The most probable classes first; all of them where there are fewer."""
        if (count := min(count, len(self.labels))) < 1:
            return []
        chances, least = (
            self.probabilities.tolist(),
            float(self.probabilities.topk(count).values[-1]),
        )
        # Of equals what is answered comes first: two logits may round to one probability.
        place = {label: n for n, label in enumerate(self._answered())}
        found = [
            (-chance, place.get(self.labels[k], len(place)), k)
            for k, chance in enumerate(chances)
            if chance >= least
        ]
        return [Choice(self.labels[k], -chance) for chance, _, k in sorted(found)[:count]]

    def _answered(self) -> list[str]:
        """What is answered, the most probable first."""
        return [self.label]

    def words(self, count: int = 1) -> list[str]:
        """As a table shows it, a cell each."""
        return [f"{label} ({probability:.1%})" for label, probability in self.top(count)]

    def to_json(self, count: int = 1) -> list[dict[str, Any]]:
        """As `restuning predict --json` writes it."""
        return [choice._asdict() for choice in self.top(count)]

    def cells(self, count: int = 1) -> dict[str, Any]:
        """As columns of a table: `answer` and `probability`, then `answer 2` and `probability 2` ..."""
        found: dict[str, Any] = {}
        for place, (label, probability) in enumerate(self.top(count), 1):
            number = f" {place}" * (place > 1)
            found |= {f"answer{number}": label, f"probability{number}": probability}
        return found


@dataclass(frozen=True)
class TagsAnswer(Prediction):
    """Any number of labels of one input: those of probability 1/2 and more.

    Attributes:
        label: Their names, the most probable first; "-" where there is none.
        probability: Of the most probable label, among them or not.
        probabilities: Of all labels, each by itself, `c` on the CPU.
        labels: Names of all labels.
        tags: Those of probability 1/2 and more, the most probable first.
    """

    tags: tuple[Choice, ...] = ()

    def _answered(self) -> list[str]:
        return [choice.label for choice in self.tags]

    def words(self, count: int = 1) -> list[str]:
        """In one cell."""
        return [", ".join(f"{label} ({chance:.1%})" for label, chance in self.tags) or "-"]

    def to_json(self, count: int = 1) -> list[dict[str, Any]]:
        """The tags, and after them the most probable others up to `count`."""
        told = self.top(max(count, len(self.tags)))
        chosen = {choice.label for choice in self.tags}
        return [{**choice._asdict(), "tag": choice.label in chosen} for choice in told]

    def cells(self, count: int = 1) -> dict[str, Any]:
        """As columns of a table: `answer`, with `|` between labels, and the probability of each label."""
        chosen = {choice.label for choice in self.tags}
        # In the order of the labels, as tables of such answers are read.
        answer = "|".join(label for label in self.labels if label in chosen)
        chances = zip(self.labels, self.probabilities.tolist(), strict=True)
        return {"answer": answer, **{f"probability of {label}": p for label, p in chances}}


@dataclass(frozen=True)
class NumbersAnswer:
    """One number or several of one input.

    Attributes:
        numbers: Each by name, in the units of the targets.
    """

    numbers: tuple[Number, ...]

    @property
    def label(self) -> str:
        """The numbers in words."""
        return self.words()[0]

    @property
    def value(self) -> float:
        """Of the first number."""
        return self.numbers[0].value

    @property
    def error(self) -> float | None:
        """Of the first number."""
        return self.numbers[0].error

    def words(self, count: int = 1) -> list[str]:
        """In one cell; a name only where there are several."""
        several = len(self.numbers) > 1
        told = (f"{n.label} {_say(n)}" if several else _say(n) for n in self.numbers)
        return [", ".join(told)]

    def to_json(self, count: int = 1) -> list[dict[str, Any]]:
        """Every number, its error and its name."""
        return [number._asdict() for number in self.numbers]

    def cells(self, count: int = 1) -> dict[str, Any]:
        """As columns of a table: `answer` and `error`, of several numbers with their names."""
        several = len(self.numbers) > 1
        return {
            f"{what} {number.label}" if several else what: value
            for number in self.numbers
            for what, value in (("answer", number.value), ("error", number.error))
        }


def find_cells(answer: Any, count: int = 1) -> dict[str, Any]:
    """An answer as columns of a table; of a kind that knows none its words."""
    if hasattr(answer, "cells"):
        return answer.cells(count)
    return {"answer": answer.words(count)[0]}


@dataclass(frozen=True, eq=False)
class VectorAnswer:
    """A vector of one input, near those of inputs of its class.

    Attributes:
        vector: At unit length, `d` on the CPU.
    """

    vector: Tensor

    @property
    def label(self) -> str:
        """The vector in words."""
        return self.words()[0]

    def words(self, count: int = 1) -> list[str]:
        """Its first numbers, in one cell."""
        first = " ".join(f"{value:.2f}" for value in self.vector[:3].tolist())
        more = " ..." if len(self.vector) > 3 else ""
        return [f"{first}{more} ({len(self.vector)} numbers)"]

    def to_json(self, count: int = 1) -> list[dict[str, Any]]:
        """All of it."""
        return [{"vector": self.vector.tolist()}]

    def cells(self, count: int = 1) -> dict[str, Any]:
        """All of it as columns of a table: `answer 1`, `answer 2` ..."""
        return {f"answer {place}": value for place, value in enumerate(self.vector.tolist(), 1)}


class Share(NamedTuple):
    """A class and the share of the pixels that are answered with it."""

    label: str
    share: float


class Window(NamedTuple):
    """What a task answers to a part of an image.

    Attributes:
        answers: On the grid on which it answers, `h w c` on the CPU.
        seen: Left, top, right and bottom of the part, in the image's own pixels.
    """

    answers: Tensor
    seen: tuple[int, int, int, int]


@dataclass(frozen=True, eq=False, kw_only=True)
class OnImage(ABC):
    """An answer with places, which lies on an image. One is equal to itself alone: what it says is not drawn to be compared.

    Attributes:
        size: Height and width of what is drawn: those of the image, or of the grid where no image is known.
        seen: Left, top, right and bottom of what the backbone was shown of the image; a crop leaves an edge out,
            whose pixels have no answer.
        windows: What the backbone was shown of it in several parts, which may overlap; empty where it was shown once.
        drawn: What is drawn, where it is there already.
    """

    size: tuple[int, int] | None = None
    seen: tuple[int, int, int, int] | None = None
    windows: Sequence[Window] = field(default=(), repr=False)
    drawn: Tensor | None = field(default=None, repr=False)

    @property
    @abstractmethod
    def on_grid(self) -> Tensor | None:
        """What is brought to the size of the image, `h w c`."""

    def list_windows(self) -> list[Window]:
        """All parts of the image that the backbone was shown, with what it answered."""
        if self.windows:
            return list(self.windows)
        assert self.on_grid is not None
        height, width = self.drawn_size()
        return [Window(self.on_grid.float(), self.seen or (0, 0, width, height))]

    def drawn_size(self) -> tuple[int, int]:
        """Height and width of what is drawn."""
        if self.size is not None:
            return self.size
        grid = self.drawn if self.on_grid is None else self.on_grid
        assert grid is not None
        return grid.shape[0], grid.shape[1]


def join_windows(
    answers: Sequence[Any], corners: Sequence[tuple[int, int]], size: tuple[int, int]
) -> Any:
    """One answer of those to windows of an image; where windows overlap they are blended.

    Args:
        answers: To each window, as it lies on that (`OnImage`).
        corners: Left and top of each window in the image.
        size: Height and width of the image.
    """
    if len(answers) == 1:
        # The whole of it: as it was answered.
        return answers[0]
    moved = [
        Window(part.answers, (left + x, top + y, right + x, bottom + y))
        for answer, (x, y) in zip(answers, corners, strict=True)
        for part in answer.list_windows()
        for left, top, right, bottom in [part.seen]
    ]
    return replace(answers[0], size=size, seen=None, windows=tuple(moved))


@dataclass(frozen=True, eq=False)
class MaskAnswer(OnImage):
    """A class for every pixel of one image.

    Attributes:
        labels: Names of all classes.
        ignore: Value of pixels of the mask that have no answer.
        values: Probabilities on the grid on which the task answers, `h w c` on the CPU; None of an answer that came from a
            server. Of several windows those of the first.
        logits: Likewise what they were made of.
        size, seen, windows, drawn: As of `OnImage`.
    """

    labels: Sequence[str] = field(repr=False)
    ignore: int = 255
    values: Tensor | None = field(default=None, repr=False)
    logits: Tensor | None = field(default=None, repr=False)

    @property
    def on_grid(self) -> Tensor | None:
        """The logits."""
        return self.logits

    @cached_property
    def mask(self) -> Tensor:
        """The most probable class of every pixel, `H W`; uint8, or int64 where numbers are larger.

        Logits are brought to the size bilinearly first, as in training. Made when it is asked for.
        """
        if self.drawn is not None:
            return self.drawn
        windows, size = self.list_windows(), self.drawn_size()
        small = 0 <= self.ignore < 256 and windows[0].answers.shape[-1] <= 256
        mask = torch.full(size, self.ignore, dtype=torch.uint8 if small else torch.long)
        for top, logits, there in blend(windows, size):
            found = logits.argmax(-1).to(mask.dtype)
            mask[top : top + len(found)][there] = found[there]
        return mask

    @cached_property
    def shares(self) -> tuple[Share, ...]:
        """Of the pixels that are answered, by class; those that are there, the largest first."""
        counts = torch.bincount(self.mask[self.mask != self.ignore].long().flatten())
        total = max(1, int(counts.sum()))
        order = counts.argsort(descending=True, stable=True).tolist()
        return tuple(Share(str(self.labels[k]), int(counts[k]) / total) for k in order if counts[k])

    @property
    def label(self) -> str:
        """The classes that are there and their shares, in words."""
        return self.words(len(self.labels))[0]

    def words(self, count: int = 1) -> list[str]:
        """The largest classes, three at least, in one cell."""
        told = [f"{label} {share:.1%}" for label, share in self.shares[: max(3, count)]]
        return [", ".join(told) or "-"]

    def to_json(self, count: int = 1) -> list[dict[str, Any]]:
        """The share of every class that is there."""
        return [share._asdict() for share in self.shares]

    def cells(self, count: int = 1) -> dict[str, Any]:
        """As columns of a table: `answer`, in words, and the share of each class."""
        there = dict(self.shares)
        shares = {f"share of {name}": there.get(name, 0.0) for name in map(str, self.labels)}
        return {"answer": self.label, **shares}


@dataclass(frozen=True, eq=False)
class DepthAnswer(OnImage):
    """A number for every pixel of one image.

    Attributes:
        values: In units, on the grid on which the task answers, `h w 1` on the CPU; None of an answer that came from a
            server. Of several windows those of the first.
        error: Root of the mean squared error of pixels of images that were left out; None where there were none.
        size, seen, windows, drawn: As of `OnImage`.
    """

    values: Tensor | None = field(default=None, repr=False)
    error: float | None = None

    @property
    def on_grid(self) -> Tensor | None:
        """The values."""
        return self.values

    @cached_property
    def depth(self) -> Tensor:
        """The number of every pixel in units, `H W` in float32; NaN where there is no answer. Made when it is asked for."""
        if self.drawn is not None:
            return self.drawn
        size = self.drawn_size()
        depth = torch.full(size, math.nan)
        for top, values, there in blend(self.list_windows(), size):
            depth[top : top + len(values)][there] = values[..., 0][there]
        return depth

    @cached_property
    def spread(self) -> tuple[float, float, float] | None:
        """Least, median and most of the numbers; None where no pixel has one."""
        there = self.depth[self.depth.isfinite()]
        if not len(there):
            return None
        return float(there.min()), float(there.median()), float(there.max())

    @property
    def label(self) -> str:
        """Least, median and most, in words."""
        return self.words()[0]

    def words(self, count: int = 1) -> list[str]:
        """In one cell."""
        if self.spread is None:
            return ["-"]
        least, median, most = self.spread
        off = "" if self.error is None else f" ± {self.error:.2g}"
        return [f"{least:.4g} to {most:.4g}, median {median:.4g}{off}"]

    def to_json(self, count: int = 1) -> list[dict[str, Any]]:
        """Least, median and most, and the error."""
        told = zip(("least", "median", "most"), self.spread or (None,) * 3, strict=True)
        return [{**dict(told), "error": self.error}]

    def cells(self, count: int = 1) -> dict[str, Any]:
        """As columns of a table: `answer`, in words, and what `to_json` tells."""
        return {"answer": self.label, **self.to_json()[0]}


def blend(windows: Sequence[Window], size: tuple[int, int]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """What windows say of every pixel of an image, some rows at a time.

    Each is brought to its own pixels bilinearly. Where several lie over a pixel their mean is taken, with weights that fall to
    nothing towards the edges of each window (`sin^2` along both sides), so that none of these is seen.

    Args:
        windows: One or more, with answers of as many numbers.
        size: Height and width of the image.

    Yields:
        Number of the first row, answers `r W c`, and which pixels any window lies over, `r W`.
    """
    (height, width), outputs = size, windows[0].answers.shape[-1]
    # Windows of an image are of one size, mostly.
    spreads: dict[tuple[int, int], Tensor] = {}

    def spread(places: int, pixels: int) -> Tensor:
        if (places, pixels) not in spreads:
            spreads[places, pixels] = _spread(places, pixels)
        return spreads[places, pixels]

    rows = max(1, NUMBERS_AT_ONCE // (width * outputs))
    for start in range(0, height, rows):
        count = min(rows, height - start)
        total, weights = torch.zeros(count, width, outputs), torch.zeros(count, width)
        for answers, (left, top, right, bottom) in windows:
            first, last = max(start, top), min(start + count, bottom)
            begin, end = max(0, left), min(width, right)
            if first >= last or begin >= end:
                continue
            part = spread(answers.shape[0], bottom - top)[first - top : last - top]
            narrow = torch.einsum("yh,hwc->ywc", part, answers)
            columns = spread(answers.shape[1], right - left)[begin - left : end - left]
            found = torch.einsum("xw,ywc->yxc", columns, narrow)
            at = slice(first - start, last - start), slice(begin, end)
            if len(windows) == 1:
                total[at], weights[at] = found, 1.0
                continue
            down = _fade(bottom - top)[first - top : last - top]
            weight = down[:, None] * _fade(right - left)[begin - left : end - left]
            total[at] += found * weight[..., None]
            weights[at] += weight
        there = weights > 0
        if len(windows) > 1:
            total /= torch.where(there, weights, 1.0)[..., None]
        yield start, total, there


def _spread(places: int, pixels: int) -> Tensor:
    """Weights of bilinear interpolation along one side, `pixels places`."""
    same = torch.eye(places).unsqueeze(0)
    return F.interpolate(same, pixels, mode="linear", align_corners=False)[0].T


def _fade(pixels: int) -> Tensor:
    """Weights along one side of a window: 1 in the middle, hardly anything at its edges."""
    return ((torch.arange(pixels) + 0.5) * (math.pi / pixels)).sin().square()


def _say(number: Number) -> str:
    if number.error is None:
        return f"{number.value:.4g}"
    # To two digits of the error: more would say what is not known.
    digits = max(0, 1 - _magnitude(number.error))
    return f"{number.value:.{digits}f} ± {number.error:.{digits}f}"


def _magnitude(value: float) -> int:
    """Of the first digit: 0 of 5, -1 of 0.5."""
    return int(f"{value:e}".partition("e")[2]) if value else 0
