"""Judges answers that are any number of labels."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from restuning.problems.judge import JudgeOfLogits, mean_of, to_floats
from restuning.problems.judged import Breakdown, Picture
from restuning.problems.meters import keep_order, read_meters
from restuning.problems.reliability import calibration_error, find_reliability


class JudgeOfLabels(JudgeOfLogits):
    """Of several labels: `Problem.metrics`, and `auroc` (the mean over labels), `nll` and `ece` of each label by itself."""

    shares = (
        "mean_average_precision",
        "f1_macro",
        "accuracy",
        "auroc",
        "ece",
        "ece_uncalibrated",
    )

    def figures(self, logits: Tensor, targets: Tensor) -> dict[str, float | None]:
        """By name."""
        meters = self.problem.metrics(logits.shape[1])
        meters.update(logits, targets)
        confidence, right = self._choose(logits, targets, self.temperature)
        plain, same = self._choose(logits, targets, 1.0)
        return {
            **read_meters(meters),
            "auroc": mean_of(self._areas(logits, targets)),
            "nll": float(self.losses(logits.double(), targets).mean()),
            "ece": calibration_error(confidence, right),
            "ece_uncalibrated": calibration_error(plain, same),
        }

    def _choose(self, logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """How sure each label's answer is, there or not, and whether it is right."""
        chances = self.problem.values(logits, temperature).flatten()
        told = logits.flatten() >= 0
        return torch.maximum(chances, 1 - chances), told == targets.flatten().bool()

    def _areas(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Under the ROC curve of each label; NaN of one that all or none have."""
        from torchmetrics.functional.classification import binary_auroc

        counts = targets.sum(0)
        order = keep_order(logits)
        found = [
            float(binary_auroc(order[:, k], targets[:, k].long()))
            if 0 < count < len(targets)
            else float("nan")
            for k, count in enumerate(counts.tolist())
        ]
        return torch.tensor(found)

    def answer_constantly(self, targets: Tensor) -> Tensor:
        """How often each label is there."""
        frequency = targets.float().mean(0).clamp(1e-6, 1 - 1e-6)
        return (self.temperature * frequency.logit()).expand(len(targets), -1)

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Means over labels of the cross entropy of what is told."""
        told, wanted = logits / self.temperature, targets.to(logits.dtype)
        return F.binary_cross_entropy_with_logits(told, wanted, reduction="none").mean(1)

    def find_wrong(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Where any label is answered wrongly."""
        return ((logits >= 0) != targets.bool()).any(1)

    def breakdown(self, logits: Tensor, targets: Tensor) -> Breakdown:
        """Examples, precision, recall, F1 and average precision of each label."""
        from torchmetrics.functional.classification import multilabel_average_precision

        told, there = (logits >= 0).double(), targets.double()
        hits, asked, answered = (told * there).sum(0), there.sum(0), told.sum(0)
        # torchmetrics knows no single label: one that no example has stands beside it.
        more = (0, max(2, logits.shape[1]) - logits.shape[1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            precision = multilabel_average_precision(
                keep_order(F.pad(logits, more)),
                F.pad(targets, more).long(),
                logits.shape[1] + more[1],
                average="none",
            )
        assert isinstance(precision, Tensor)
        precision = torch.where(asked > 0, precision[: logits.shape[1]], torch.nan)
        columns = {
            "examples": asked.long().tolist(),
            "precision": to_floats(hits / answered),
            "recall": to_floats(hits / asked),
            "F1": to_floats(2 * hits / (asked + answered)),
            "average precision": to_floats(precision),
        }
        return Breakdown(self.labels, columns, [name for name in columns if name != "examples"])

    def pictures(self, logits: Tensor, targets: Tensor) -> list[Picture]:
        """Whether probabilities mean what they say."""
        return [find_reliability(*self._choose(logits, targets, self.temperature))]

    def say(self, target: Tensor) -> str:
        """The labels that are there."""
        names = [self.labels[k] for k in target.nonzero()[:, 0].tolist()]
        return ", ".join(names) or "-"

    def rows(self, logits: Tensor, targets: Tensor, losses: Tensor) -> list[Mapping[str, Any]]:
        """True and answered labels with `|` between them, the probability of each label, and the loss."""
        chances = self.problem.values(logits, self.temperature)
        found = []
        for z, p, y, loss in zip(logits, chances, targets, losses.tolist(), strict=True):
            names = [
                [self.labels[k] for k in each.nonzero()[:, 0].tolist()] for each in (y, z >= 0)
            ]
            each = {
                f"probability of {name}": chance
                for name, chance in zip(self.labels, p.tolist(), strict=True)
            }
            found.append(
                {"true": "|".join(names[0]), "answer": "|".join(names[1]), **each, "loss": loss}
            )
        return found
