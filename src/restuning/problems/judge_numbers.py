"""Judges answers that are numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from restuning.problems.judge import JudgeOfLogits, to_floats
from restuning.problems.judged import Breakdown, Picture, Scatter
from restuning.problems.meters import read_meters


class JudgeOfNumbers(JudgeOfLogits):
    """Of numbers: `r2`, `mae` and `rmse` as `Problem.metrics` has them, and of each number by itself."""

    def figures(self, logits: Tensor, targets: Tensor) -> dict[str, float | None]:
        """By name."""
        meters = self.problem.metrics(logits.shape[1])
        meters.update(logits, targets)
        return read_meters(meters)

    def answer_constantly(self, targets: Tensor) -> Tensor:
        """The mean of each number, standardised as a head answers."""
        mean = targets.double().mean(0, keepdim=True)
        return self.problem.columns(mean, len(self.labels)).float().expand(len(targets), -1)

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Means over numbers of squared standardised errors."""
        wanted = self.problem.columns(targets, targets.shape[1])
        return (logits.double() - wanted).square().mean(1).float()

    def breakdown(self, logits: Tensor, targets: Tensor) -> Breakdown | None:
        """R2, errors and range of each number; None of a single one, whose figures are those of all."""
        if targets.shape[1] < 2:
            return None
        off = self.problem.values(logits).double() - targets.double()
        spread = targets.double().var(0, correction=0)
        # Of what never changes there is no share of variance.
        r2 = torch.where(spread > 0, 1 - off.square().mean(0) / spread, torch.nan)
        columns = {
            "R2": to_floats(r2),
            "MAE": to_floats(off.abs().mean(0)),
            "RMSE": to_floats(off.square().mean(0).sqrt()),
            "least": to_floats(targets.amin(0)),
            "most": to_floats(targets.amax(0)),
        }
        return Breakdown(self.labels, columns)

    def pictures(self, logits: Tensor, targets: Tensor) -> list[Picture]:
        """Each number as it is and as it was answered."""
        values, errors = self.problem.values(logits), getattr(self.problem, "error", None)
        return [
            Scatter(name, truth.tolist(), told.tolist(), None if errors is None else errors[n])
            for n, (name, truth, told) in enumerate(
                zip(self.labels, targets.T, values.T, strict=True)
            )
        ]

    def say(self, target: Tensor) -> str:
        """The numbers; their names where there are several."""
        several = len(self.labels) > 1
        told = zip(self.labels, target.tolist(), strict=True)
        return ", ".join(
            f"{name} {value:.4g}" if several else f"{value:.4g}" for name, value in told
        )

    def rows(self, logits: Tensor, targets: Tensor, losses: Tensor) -> list[Mapping[str, Any]]:
        """Each number as it is and as it was answered, and the loss."""
        values, several = self.problem.values(logits).tolist(), len(self.labels) > 1
        return [
            {
                **{
                    f"{what} {name}" if several else what: value
                    for name, y, x in zip(self.labels, truth, told, strict=True)
                    for what, value in (("true", y), ("answer", x))
                },
                "loss": loss,
            }
            for truth, told, loss in zip(targets.tolist(), values, losses.tolist(), strict=True)
        ]
