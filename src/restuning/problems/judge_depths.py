"""Judges answers that are a number for every pixel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from restuning.problems.judge import Judge, keep_worst
from restuning.problems.judged import Judged, Mistake, Pixels
from restuning.problems.meters import read_meters
from restuning.problems.palette import make_shades, to_shades
from restuning.problems.pixels import enlarge

if TYPE_CHECKING:
    from restuning.problems.depth import Depth


class _Kept(NamedTuple):
    """An image that may be among the worst: its numbers in units, and its loss."""

    row: int
    loss: float
    truth: Tensor
    told: Tensor


class JudgeOfDepths(Judge):
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
        if self._constant is None:
            self._constant = self.problem.metrics(1).to(logits.device)
        # Standardised by the training images, whose mean is 0.
        self._constant.update(torch.zeros_like(logits[:, :1, :1]), targets)
        first = len(self._losses) - len(logits)
        for n, (one, wanted) in enumerate(zip(logits.split(1), targets.split(1), strict=True)):
            told, truth = self.problem.values(enlarge(one, wanted)[0, 0]).cpu(), wanted[0].cpu()
            loss = self._losses[first + n]
            self._rows.append(self._tell_row(told, truth, loss))
            self._worst = keep_worst([*self._worst, _Kept(first + n, loss, truth, told)])

    def _tell_row(self, told: Tensor, truth: Tensor, loss: float) -> dict[str, Any]:
        known = self.problem.known(truth)
        off = told[known].double() - truth[known].double()
        there = len(off) > 0
        return {
            "RMSE": float(off.square().mean().sqrt()) if there else None,
            "MAE": float(off.abs().mean()) if there else None,
            "known pixels": len(off),
            "loss": loss,
        }

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
        both = torch.cat([kept.truth[known], kept.told[known]])
        if not len(both):
            return Mistake(kept.row, "-", "no known pixel", kept.loss)
        # One scale: what is as bright is as far.
        least, most = float(both.min()), float(both.max())
        truth, told = _say(kept.truth[known]), _say(kept.told[known])
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
