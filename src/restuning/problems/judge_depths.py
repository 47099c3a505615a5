"""Judges answers that are a number for every pixel."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from restuning.problems.judge import JudgeOfPixels, keep_worst, thin_map
from restuning.problems.judged import Judged, Mistake, Pixels
from restuning.problems.meters import read_meters
from restuning.problems.palette import make_shades, to_shades
from restuning.problems.pixels import enlarge

if TYPE_CHECKING:
    from restuning.problems.depth import Depth


class _Kept(NamedTuple):
    """An image that may be among the worst: its numbers in units, what is said of them, and its loss."""

    row: int
    loss: float
    truth: Tensor
    told: Tensor
    said: tuple[str, str] | None


class _Sums(NamedTuple):
    """Of some pixels: how many are known, and sums of how far off answers are and of the squares of that."""

    known: int
    absolute: float
    squares: float


class JudgeOfDepths(JudgeOfPixels):
    """Of numbers of pixels: what `Depth.metrics` has, over all known pixels of a split, and of each image by itself.

    The answer that is always the same is the mean of the training images.

    Cost: of the numbers sums are kept; those of `WORST` images are held, and one answer is drawn at a time.
    """

    problem: Depth

    def __init__(self, problem: Depth, labels: Sequence[str], temperature: float = 1.0) -> None:
        super().__init__(problem, labels, temperature)
        self._constant: Any = None
        self._rows: list[dict[str, Any]] = []
        self._worst: list[_Kept] = []

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Take in a batch: logits `b h w 1`, depths `b H W`."""
        logits = logits.detach()
        super().update(logits, targets)
        self._count_constant(logits, targets)
        first = len(self._losses) - len(logits)
        for n, (one, wanted) in enumerate(zip(logits.split(1), targets.split(1), strict=True)):
            told, truth = self.problem.values(enlarge(one, wanted)[0, 0]).cpu(), wanted[0].cpu()
            self._take(first + n, told, truth, [self._count(told, truth)])

    def update_in_rows(self, parts: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Take in one image; see `JudgeOfPixels`."""
        told: list[Tensor] = []
        truth: list[Tensor] = []
        sums: list[_Sums] = []
        total = 0.0
        for logits, wanted in parts:
            # Meters and losses of a part as of an image; the losses make one below.
            super().update(logits[None], wanted[None])
            self._count_constant(logits[None], wanted[None])
            said = self.problem.values(logits[..., 0]).cpu()
            sums.append(self._count(said, wanted.cpu()))
            total += self._losses.pop() * sums[-1].known
            told.append(said)
            truth.append(wanted.cpu())
        self._losses.append(total / max(1, sum(each.known for each in sums)))
        self._take(len(self._losses) - 1, torch.cat(told), torch.cat(truth), sums)

    def _count_constant(self, logits: Tensor, targets: Tensor) -> None:
        if self._constant is None:
            self._constant = self.problem.metrics(1).to(logits.device)
        # Standardised by the training images, whose mean is 0.
        self._constant.update(torch.zeros_like(logits[:, :1, :1]), targets)

    def _count(self, told: Tensor, truth: Tensor) -> _Sums:
        known = self.problem.known(truth)
        off = told[known].double() - truth[known].double()
        return _Sums(len(off), float(off.abs().sum()), float(off.square().sum()))

    def _take(self, row: int, told: Tensor, truth: Tensor, sums: Sequence[_Sums]) -> None:
        known, absolute, squares = (sum(each) for each in zip(*sums, strict=True))
        loss = self._losses[row]
        self._rows.append(
            {
                "RMSE": math.sqrt(squares / known) if known else None,
                "MAE": absolute / known if known else None,
                "known pixels": known,
                "loss": loss,
            }
        )
        there = self.problem.known(truth)
        said = (_say(truth[there]), _say(told[there])) if known else None
        new = _Kept(row, loss, thin_map(truth), thin_map(told), said)
        self._worst = keep_worst([*self._worst, new])

    def conclude(self) -> Judged:
        """What the answers so far are worth."""
        if self._meters is None:
            return Judged(0, {})
        return Judged(
            len(self._losses),
            read_meters(self._meters),
            read_meters(self._constant),
            ["delta_1"],
            worst=[self._tell_mistake(each) for each in self._worst],
            rows=self._rows,
        )

    def _tell_mistake(self, kept: _Kept) -> Mistake:
        known = self.problem.known(kept.truth)
        if kept.said is None:
            return Mistake(kept.row, "-", "no known pixel", kept.loss)
        truth, told = kept.said
        both = torch.cat([kept.truth[known], kept.told[known]])
        # One scale: what is as bright is as far. Of a map that was thinned all that is known may be gone.
        least, most = (float(both.min()), float(both.max())) if len(both) else (0.0, 0.0)
        rmse = self._rows[kept.row]["RMSE"]
        pictures = [
            Pixels(title, said, _paint(numbers, known, least, most))
            for title, said, numbers in (
                ("true", truth, kept.truth),
                ("answered", told, kept.told),
            )
        ]
        return Mistake(kept.row, f"{told}; RMSE {rmse:.3g}", truth, kept.loss, pictures)


def _say(numbers: Tensor) -> str:
    return f"{float(numbers.min()):.4g} to {float(numbers.max()):.4g}, median {float(numbers.median()):.4g}"


def _paint(numbers: Tensor, known: Tensor, least: float, most: float) -> Tensor:
    """`H W 3` in bytes; grey where the truth is unknown."""
    colours = torch.tensor(make_shades(), dtype=torch.uint8).view(-1, 3)
    return colours[to_shades(torch.where(known, numbers, torch.nan), least, most)]
