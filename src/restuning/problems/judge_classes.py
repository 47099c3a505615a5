"""Judges answers that are one class of several."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from restuning.problems.judge import JudgeOfLogits, mean_of, to_floats
from restuning.problems.judged import Breakdown, Confusion, Picture
from restuning.problems.meters import keep_order
from restuning.problems.reliability import calibration_error, find_reliability

MOST_SORTED = 2**25
"""Probabilities up to which areas under ROC curves are counted: they are sorted, class by class (seconds)."""


class JudgeOfClasses(JudgeOfLogits):
    """Of single labels, and of tokens one by one.

    `accuracy`, `balanced_accuracy` (mean recall of the classes that are there), `f1_macro`, `auroc` (one class against the
    rest, the mean over classes), `nll` and `ece` of the probabilities as they are told, and `ece_uncalibrated` at
    temperature 1.
    """

    shares = ("accuracy", "balanced_accuracy", "f1_macro", "auroc", "ece", "ece_uncalibrated")

    @property
    def _classes(self) -> int:
        return max(2, len(self.labels))

    def figures(self, logits: Tensor, targets: Tensor) -> dict[str, float | None]:
        """By name."""
        return self._figures(logits, targets, self._auroc(logits, targets))

    def constant_figures(self, logits: Tensor, targets: Tensor) -> dict[str, float | None]:
        """Of one answer nothing is ranked above anything: areas are a half, and need no sorting."""
        defined = len(targets.unique()) > 1 and logits.numel() <= MOST_SORTED
        return self._figures(logits, targets, 0.5 if defined else None)

    def _figures(
        self, logits: Tensor, targets: Tensor, auroc: float | None
    ) -> dict[str, float | None]:
        from torchmetrics.functional.classification import multiclass_f1_score

        chances = self.problem.values(logits, self.temperature)
        # Of the logits: two of them may round to one probability.
        told = logits.argmax(1)
        right = told == targets
        plain = self.problem.values(logits)
        return {
            "accuracy": float(right.double().mean()),
            "balanced_accuracy": mean_of(self._recall(logits, targets)),
            "f1_macro": float(multiclass_f1_score(told, targets, self._classes, average="macro")),
            "auroc": auroc,
            "nll": float(F.cross_entropy(logits.double() / self.temperature, targets)),
            "ece": calibration_error(chances.amax(1), right),
            "ece_uncalibrated": calibration_error(plain.amax(1), right),
        }

    def _recall(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Of each class; NaN of one that no example has."""
        counts = self._confuse(logits, targets)
        return counts.diagonal() / counts.sum(1)

    def _auroc(self, logits: Tensor, targets: Tensor) -> float | None:
        from torchmetrics.functional.classification import multiclass_auroc

        if logits.numel() > MOST_SORTED or logits.shape[1] < 2:
            return None
        chances = keep_order(_log_odds(logits.double() / self.temperature))
        with warnings.catch_warnings():
            # Of classes that no example has, which are left out here: torchmetrics counts them as 0.
            warnings.simplefilter("ignore", UserWarning)
            each = multiclass_auroc(chances, targets, chances.shape[1], average="none")
        counts = torch.bincount(targets, minlength=chances.shape[1])
        assert isinstance(each, Tensor)
        return mean_of(each[(counts > 0) & (counts < len(targets))])

    def _confuse(self, logits: Tensor, targets: Tensor) -> Tensor:
        from torchmetrics.functional.classification import multiclass_confusion_matrix

        return multiclass_confusion_matrix(logits.argmax(1), targets, self._classes)

    def answer_constantly(self, targets: Tensor) -> Tensor:
        """How often each class is there, told of every example at the temperature 1."""
        counts = torch.bincount(targets, minlength=len(self.labels)).float()
        # What is told is divided by the temperature; the constant answer has none.
        logits = self.temperature * (counts.clamp(min=1e-6) / len(targets)).log()
        return logits.expand(len(targets), -1)

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross entropies of what is told."""
        return F.cross_entropy(logits / self.temperature, targets, reduction="none")

    def find_wrong(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Where the class is another."""
        return logits.argmax(1) != targets

    def breakdown(self, logits: Tensor, targets: Tensor) -> Breakdown:
        """Examples, precision, recall and F1 of each class."""
        counts = self._confuse(logits, targets)[: len(self.labels), : len(self.labels)].double()
        hits, there, told = counts.diagonal(), counts.sum(1), counts.sum(0)
        columns = {
            "examples": there.long().tolist(),
            # Nothing over nothing is no number.
            "precision": to_floats(hits / told),
            "recall": to_floats(hits / there),
            "F1": to_floats(2 * hits / (there + told)),
        }
        return Breakdown(self.labels, columns, ("precision", "recall", "F1"))

    def pictures(self, logits: Tensor, targets: Tensor) -> list[Picture]:
        """Which classes are taken for which, and whether probabilities mean what they say."""
        counts = self._confuse(logits, targets)[: len(self.labels), : len(self.labels)]
        chances = self.problem.values(logits, self.temperature)
        right = logits.argmax(1) == targets
        return [Confusion(counts, self.labels), find_reliability(chances.amax(1), right)]

    def say(self, target: Tensor) -> str:
        """The name of a class."""
        return self.labels[int(target)]

    def rows(self, logits: Tensor, targets: Tensor, losses: Tensor) -> list[Mapping[str, Any]]:
        """True and answered class, the probability of both, and the loss."""
        chances = self.problem.values(logits, self.temperature)
        told = logits.argmax(1)
        columns = (
            targets.tolist(),
            told.tolist(),
            chances.gather(1, told[:, None])[:, 0].tolist(),
            chances.gather(1, targets[:, None])[:, 0].tolist(),
            losses.tolist(),
        )
        return [
            {
                "true": self.labels[y],
                "answer": self.labels[k],
                "probability": p,
                "probability of true": q,
                "loss": loss,
            }
            for y, k, p, q, loss in zip(*columns, strict=True)
        ]


def _log_odds(logits: Tensor) -> Tensor:
    """`log p / (1 - p)` of each class, `n C`; also where p is 1 in any precision."""
    likelihood = logits.log_softmax(1)
    top = logits.argmax(1, keepdim=True)
    others = logits.scatter(1, top, -torch.inf).logsumexp(1, keepdim=True)
    # Of all but the most probable p is a half at most, and 1 - p is exact.
    odds = likelihood - torch.log1p(-likelihood.exp())
    return odds.scatter(1, top, logits.gather(1, top) - others)
