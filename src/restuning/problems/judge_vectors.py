"""Judges answers that are vectors, by what lies nearest to each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from restuning.problems.judge import JudgeOfLogits, to_floats
from restuning.problems.judged import Breakdown, Mistake
from restuning.problems.meters import read_meters
from restuning.problems.retrieval import QUERIES


class JudgeOfVectors(JudgeOfLogits):
    """Of embeddings: `Problem.metrics`, and whether the nearest other example of the split is of the same class."""

    shares = ("recall_at_1", "recall_at_5", "mean_average_precision")

    def figures(self, logits: Tensor, targets: Tensor) -> dict[str, float | None]:
        """By name."""
        meters = self.problem.metrics(logits.shape[1])
        meters.update(logits, targets)
        return read_meters(meters)

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """How far the nearest example of the class is beyond the nearest of another, in cosines, `n`.

        The larger the worse; that of a class of one example is the least there is.
        """
        found = []
        unit = F.normalize(logits, dim=-1)
        for at in torch.arange(len(unit)).split(QUERIES):
            cosines, same = unit[at] @ unit.T, targets[at][:, None] == targets
            cosines[torch.arange(len(at)), at] = -2
            own = cosines.where(same, -2).amax(1)
            other = cosines.where(~same, -2).amax(1)
            found.append(torch.where(own > -2, other - own, -2))
        return torch.cat(found)

    def find_wrong(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Where the nearest is of another class, though one of the same is there.

        By the one nearest that `rows` tell: of equal cosines a loss of zero says nothing.
        """
        nearest, _ = self._nearest(logits)
        alone = torch.bincount(targets)[targets] < 2
        return (targets[nearest] != targets) & ~alone

    def _nearest(self, logits: Tensor, asked: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The number of the nearest other example of each that is asked (None for all), and its cosine."""
        unit = F.normalize(logits, dim=-1)
        asked = torch.arange(len(unit)) if asked is None else asked
        if len(unit) < 2:
            return torch.zeros(len(asked), dtype=torch.long), torch.zeros(len(asked))
        parts = []
        for at in asked.split(QUERIES):
            cosines = unit[at] @ unit.T
            cosines[torch.arange(len(at)), at] = -2
            parts.append(cosines.max(1))
        return torch.cat([p.indices for p in parts]), torch.cat([p.values for p in parts])

    def breakdown(self, logits: Tensor, targets: Tensor) -> Breakdown:
        """Examples of each class, and the share of those whose nearest is of it, where there are two or more."""
        classes = len(self.labels)
        counts = torch.bincount(targets, minlength=classes)
        hits = torch.bincount(targets[~self.find_wrong(logits, targets)], minlength=classes)
        shares = torch.where(counts > 1, hits / counts, torch.nan)
        columns = {"examples": counts.tolist(), "recall at 1": to_floats(shares)}
        return Breakdown(self.labels, columns, ("recall at 1",), "classes")

    def mistake(self, row: int, logits: Tensor, targets: Tensor, loss: float) -> Mistake:
        """The class of the nearest."""
        nearest, _ = self._nearest(logits, torch.tensor([row]))
        return Mistake(row, f"near {self.say(targets[nearest[0]])}", self.say(targets[row]), loss)

    def say(self, target: Tensor) -> str:
        """The name of a class."""
        return self.labels[int(target)]

    def rows(self, logits: Tensor, targets: Tensor, losses: Tensor) -> list[Mapping[str, Any]]:
        """The class, that of the nearest other example, its number and cosine."""
        nearest, cosines = self._nearest(logits)
        columns = (targets, targets[nearest], nearest, cosines, losses)
        return [
            {
                "true": self.labels[y],
                "class of nearest": self.labels[k],
                "nearest": n,
                "cosine": cosine,
                "loss": loss,
            }
            for y, k, n, cosine, loss in zip(*(c.tolist() for c in columns), strict=True)
        ]
