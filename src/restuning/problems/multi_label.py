"""Any number of labels an input."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from restuning.problems.answers import Choice, TagsAnswer
from restuning.problems.judge_labels import JudgeOfLabels
from restuning.problems.meters import keep_order
from restuning.problems.problem import Problem, Shown, collect, problem
from restuning.problems.single_label import SCALES
from restuning.problems.targets import check_floats, refuse_first

HALF = 0.5
"""A label is answered from this probability on."""

RARE = 1e-3
"""Frequency of a label that no row has, where neighbours vote."""


@problem("multi-label")
class MultiLabel(Problem):
    """Each label is there or not. Targets are 0 and 1 in floating point, `b c`.

    The loss is binary cross-entropy, the mean over labels. Labels that no example of a split has do not
    count in its mean average precision, which has no value where none of them does.
    """

    metric = "mean_average_precision"
    pipeline_tags = {
        "image": "image-classification",
        "text": "text-classification",
        "audio": "audio-classification",
    }
    prints = "answer.label, answer.probability"
    loss_name = "binary cross entropy"
    noun = "labels"

    def check_targets(
        self, targets: Any, outputs: int | None = None, shown: Shown | None = None
    ) -> None:
        """Refuse what is not 0 or 1 for each label.

        Raises:
            TrainingError: Another kind or shape, or another number, such as NaN.
        """
        check_floats(targets, outputs, shown, "0 or 1 for each label", "a label")
        refuse_first(
            (targets != 0) & (targets != 1),
            targets,
            shown,
            "a target of several labels is 0 or 1",
            "give 1 where the label is there, and 0 where it is not",
        )

    def stand_in(self, logits: Tensor) -> Tensor:
        """No label."""
        return torch.zeros_like(logits, dtype=torch.float32)

    def loss(self, logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """The sum over examples of the mean over labels of binary cross entropy."""
        return self._losses(logits, targets, smoothing).sum()

    def losses_of_several(self, logits: Tensor, targets: Tensor, smoothing: Tensor) -> Tensor:
        """As `loss`, the mean over examples, of every run."""
        return self._losses(logits, targets.expand_as(logits), smoothing.unsqueeze(-1)).mean(1)

    def _losses(self, logits: Tensor, targets: Tensor, smoothing: Any) -> Tensor:
        wanted = targets.to(logits.dtype) * (1 - smoothing) + smoothing / 2
        return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(-1)

    def counts(self, targets: Tensor, outputs: int) -> Tensor:
        """Examples that have each label."""
        return targets.sum(0).long()

    def balance(self, targets: Tensor, outputs: int) -> Tensor:
        """Of each label `n / (2 n_0)` where it is not there and `n / (2 n_1)` where it is, `2 c`.

        Their ratio is the `pos_weight` of torch, `n_0 / n_1`, and the mean of each label 1, so that none
        counts for more than another. A label that all have or none has weighs 1.
        """
        there = targets.sum(0)
        counts = torch.stack([len(targets) - there, there])
        weights = len(targets) / (2 * counts.clamp(min=1))
        return torch.where((counts > 0).all(0), weights, 1.0)

    def weighted_loss(
        self, logits: Tensor, targets: Tensor, weights: Tensor, smoothing: float = 0.0
    ) -> Tensor:
        """As `loss`, each label's times the weight of what is true of it, `2 c`."""
        absent, present = weights.to(logits)
        wanted = targets.to(logits.dtype) * (1 - smoothing) + smoothing / 2
        each = F.binary_cross_entropy_with_logits(
            logits, wanted, absent, reduction="none", pos_weight=present / absent
        )
        return each.mean(-1).sum()

    def groups(self, targets: Tensor, outputs: int) -> list[Tensor]:
        """The examples that have each label, and those that have none; an example may be of several groups."""
        labels = [column.nonzero()[:, 0] for column in targets.T]
        return [*labels, (targets.sum(1) == 0).nonzero()[:, 0]]

    def metrics(self, outputs: int) -> Any:
        """`mean_average_precision`, `f1_macro` and `accuracy` (of single labels), means over labels."""
        from torchmetrics.classification import (
            BinaryAccuracy,
            BinaryF1Score,
            MultilabelAccuracy,
            MultilabelAveragePrecision,
            MultilabelF1Score,
        )

        # torchmetrics knows no single label: one that no example has stands beside it.
        width = max(2, outputs)

        class OverLabelsThatAreThere(MultilabelAveragePrecision):
            def __init__(self) -> None:
                super().__init__(width, average="none", sync_on_compute=False)
                self.add_state("there", torch.zeros(width), dist_reduce_fx="sum")

            def update(self, logits: Tensor, targets: Tensor) -> None:
                more = (0, width - outputs)
                logits, targets = F.pad(logits.float(), more), F.pad(targets, more)
                super().update(keep_order(logits), targets.long())
                self.there += targets.sum(0)

            def compute(self) -> Tensor:
                with warnings.catch_warnings():
                    # Those that no example has, which are left out here: torchmetrics counts them as 0.
                    warnings.simplefilter("ignore", UserWarning)
                    each = super().compute()
                return each[self.there > 0].mean()

        def of_logits(several: Any, single: Any) -> Any:
            kind: Any = several if outputs > 1 else single

            class OfLogits(kind):
                def update(self, logits: Tensor, targets: Tensor) -> None:
                    # Given logits, torchmetrics takes them for probabilities where all lie in 0 to 1.
                    super().update(logits.float().sigmoid(), targets.long())

            how = {"num_labels": outputs, "average": "macro"} if outputs > 1 else {}
            return OfLogits(**how, sync_on_compute=False)

        return collect(
            {
                "mean_average_precision": OverLabelsThatAreThere(),
                "f1_macro": of_logits(MultilabelF1Score, BinaryF1Score),
                "accuracy": of_logits(MultilabelAccuracy, BinaryAccuracy),
            }
        )

    def judge(self, labels: Sequence[str], temperature: float = 1.0) -> JudgeOfLabels:
        """See `JudgeOfLabels`."""
        return JudgeOfLabels(self, labels, temperature)

    def values(self, logits: Tensor, temperature: float = 1.0) -> Tensor:
        """The probability of each label by itself."""
        return (logits.float() / temperature).sigmoid()

    def answer(self, values: Tensor, logits: Tensor, labels: Sequence[str]) -> TagsAnswer:
        """The labels of probability 1/2 and more."""
        order = logits.argsort(descending=True, stable=True).tolist()
        tags = tuple(Choice(str(labels[k]), float(values[k])) for k in order if values[k] >= HALF)
        told = ", ".join(choice.label for choice in tags) or "-"
        return TagsAnswer(told, float(values[order[0]]), values, labels, tags)

    def choices(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor] | None:
        """Each label as a choice between two classes, of logits 0 and z."""
        z = logits.flatten()
        return torch.stack([torch.zeros_like(z), z], 1), targets.flatten().long()

    def columns(self, targets: Tensor, outputs: int) -> Tensor:
        """As they are."""
        return targets.double()

    @property
    def scales(self) -> Sequence[float]:
        """From 1 to 128."""
        return SCALES

    def offset(self, middle: Tensor, count: int, scale: float) -> Tensor:
        """So that a fit at a label's mean is answered with its frequency."""
        # With half an example more of each, so that labels of all and of none have finite odds.
        frequency = (middle * count + 0.5) / (count + 1)
        return frequency.logit() - scale * middle

    def logits_of_means(self, means: Tensor, count: Tensor, middle: Tensor) -> Tensor:
        """The log-odds of votes."""
        # A label of no row, or of every one, is unlikely and not impossible.
        middle = middle.clamp(RARE, 1 - RARE)
        return ((count * means + middle) / (count + 1)).logit()

    def surprise(self, outputs: int) -> float:
        """`log 2`, the mean over labels."""
        return math.log(2)

    def gradient(self, logits: Tensor, columns: Tensor) -> Tensor:
        """Probabilities less the truth, over the number of labels."""
        return (logits.sigmoid() - columns) / columns.shape[1]
