"""One class of several, for an input or for each of its tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from restuning._errors import TrainingError
from restuning.problems.answers import Prediction
from restuning.problems.judge_classes import JudgeOfClasses
from restuning.problems.problem import Problem, Shown, collect, problem
from restuning.problems.targets import tell_form

# `ignore_index` of `F.cross_entropy` by default, so such a token's loss is zero unasked.
IGNORED = -100
"""Label of tokens that do not count."""

SCALES = tuple(2.0 ** (k / 2) for k in range(15))
"""Factors that are tried to turn answers between 0 and 1 into logits: from 1 to 128."""


@problem("single-label")
class SingleLabel(Problem):
    """One class an input. Targets are whole numbers, `b`; of tokens `b n`, `IGNORED` where one has none.

    The loss is cross-entropy. An example of labelled tokens counts as one: the mean over its tokens.
    """

    metric = "accuracy"
    pipeline_tags = {
        "image": "image-classification",
        "text": "text-classification",
        "audio": "audio-classification",
        "words": "token-classification",
    }
    prints = "answer.label, answer.probability"
    counted = True
    loss_name = "cross entropy"
    one_hot = True
    beside = False

    def check_targets(
        self, targets: Any, outputs: int | None = None, shown: Shown | None = None
    ) -> None:
        """Refuse what are no whole numbers, and a class beyond the outputs.

        Raises:
            TrainingError: A target is no class, or one that no output stands for: on a GPU it would
                end the process.
        """
        whole = isinstance(targets, Tensor) and targets.ndim in (1, 2)
        if not whole or targets.is_floating_point():
            raise TrainingError(
                "labels must be whole numbers, one an example or one a token",
                found=tell_form(targets),
                fix="let the data set yield (input, class index)",
            )
        if outputs is None:
            return
        # Ignored tokens are of no class; labels of nothing else have no range to be refused for.
        wrong = (targets < 0) | (targets >= outputs)
        if targets.ndim == 2:
            wrong &= targets != IGNORED
        if not bool(wrong.any()):
            return
        (row, *_), label = wrong.nonzero()[0].tolist(), int(targets[wrong][0])
        raise TrainingError(
            "a label is outside the task's classes",
            where="" if shown is None else shown(row),
            found=f"label {label}, {outputs} classes (0 to {outputs - 1})",
            fix="build the task with num_classes of this data set",
        )

    def stand_in(self, logits: Tensor) -> Tensor:
        """The first class."""
        return torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)

    def loss(self, logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """The sum over examples of the cross entropy."""
        if targets.ndim == 1 and logits.ndim == 2:
            return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
        return self.score(logits, targets, smoothing)[0]

    def score(
        self, logits: Tensor, targets: Tensor, smoothing: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Sums over examples of the cross entropy, and of the right answers.

        Raises:
            TrainingError: Logits and targets do not belong together.
        """
        if logits.ndim != targets.ndim + 1:
            raise TrainingError(
                "logits and labels do not belong together",
                found=f"logits {tuple(logits.shape)}, labels {tuple(targets.shape)}",
                fix='a label for every token wants a task with pool="all", one a text another pool',
            )
        if targets.ndim == 1:
            # Sums, not means: pieces and processes differ in size, and the loop divides once by the
            # batch.
            loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
            return loss, (logits.detach().argmax(1) == targets).sum()
        each = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=smoothing
        ).view(targets.shape)
        counted = targets != IGNORED
        # A text may have no labelled token at all: zero over one, not zero over zero.
        number = counted.sum(1).clamp(min=1)
        right = ((logits.detach().argmax(-1) == targets) & counted).sum(1) / number
        return (each.sum(1) / number).sum(), right.sum()

    def losses_of_several(self, logits: Tensor, targets: Tensor, smoothing: Tensor) -> Tensor:
        """Cross entropy of every run."""
        # torch's own takes one smoothing for all; this is (1 - s) of the right class, s of the mean.
        likelihood = logits.log_softmax(-1)
        right = likelihood.gather(-1, targets.expand(len(logits), -1).unsqueeze(-1)).squeeze(-1)
        smooth = right + smoothing * (likelihood.mean(-1) - right)
        return -smooth.mean(1)

    def counts(self, targets: Tensor, outputs: int) -> Tensor:
        """Examples of each class; of labelled tokens their number."""
        return torch.bincount(targets[targets != IGNORED].flatten(), minlength=outputs)

    def balance(self, targets: Tensor, outputs: int) -> Tensor:
        """`n / (C n_c)`, as scikit-learn's "balanced": inversely by how often a class is there, 1 on average.

        C counts the classes that have an example; what has none weighs 1.
        """
        return weigh_inversely(self.counts(targets, outputs))

    def weighted_loss(
        self, logits: Tensor, targets: Tensor, weights: Tensor, smoothing: float = 0.0
    ) -> Tensor:
        """As `loss`, each cross entropy times the weight of the right class, `C`."""
        each = F.cross_entropy(
            logits.flatten(0, -2), targets.flatten(), reduction="none", label_smoothing=smoothing
        ).view(targets.shape)
        each = each * weights.to(each)[targets.clamp(min=0)]
        if targets.ndim == 1:
            return each.sum()
        return (each.sum(1) / (targets != IGNORED).sum(1).clamp(min=1)).sum()

    def groups(self, targets: Tensor, outputs: int) -> list[Tensor]:
        """The examples of each class."""
        return [(targets == label).nonzero()[:, 0] for label in range(outputs)]

    def metrics(self, outputs: int) -> Any:
        """`accuracy`, and `f1_macro`: the mean F1 of the classes that are asked or answered."""
        from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

        # Of a single class they are not defined.
        classes = max(2, outputs)
        alone: Any = {"sync_on_compute": False}
        return collect(
            {
                "accuracy": MulticlassAccuracy(classes, average="micro", **alone),
                "f1_macro": MulticlassF1Score(classes, average="macro", **alone),
            }
        )

    def measure(self, logits: Tensor, targets: Tensor) -> float | None:
        """The share of right answers."""
        return float(self.score(logits, targets)[1]) / len(targets) if len(targets) else None

    def judge(self, labels: Sequence[str], temperature: float = 1.0) -> JudgeOfClasses:
        """See `JudgeOfClasses`."""
        return JudgeOfClasses(self, labels, temperature)

    def values(self, logits: Tensor, temperature: float = 1.0) -> Tensor:
        """Probabilities, which sum to 1."""
        return to_probabilities(logits, temperature)

    def answer(self, values: Tensor, logits: Tensor, labels: Sequence[str]) -> Prediction:
        """The most probable class."""
        # Of the logits: two of them may round to one probability.
        top = int(logits.argmax(-1))
        return Prediction(labels[top], float(values[top]), values, labels)

    def choices(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor] | None:
        """As they are."""
        return logits, targets

    def columns(self, targets: Tensor, outputs: int) -> Tensor:
        """One-hot."""
        return F.one_hot(targets, outputs).double()

    @property
    def scales(self) -> Sequence[float]:
        """From 1 to 128."""
        return SCALES

    def from_columns(self, columns: Tensor) -> Tensor:
        """Where the one is."""
        return columns.argmax(1)

    def logits_of_means(self, means: Tensor, count: Tensor, middle: Tensor) -> Tensor:
        """Logarithms of votes."""
        return ((count * means + middle) / (count + 1)).log()

    def mean_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy."""
        if targets.ndim == 1:
            return F.cross_entropy(logits, targets)
        return super().mean_loss(logits, targets)

    def surprise(self, outputs: int) -> float:
        """`log C`."""
        return math.log(max(2, outputs))

    def gradient(self, logits: Tensor, columns: Tensor) -> Tensor:
        """Probabilities less the truth."""
        return logits.softmax(1) - columns


@problem("tokens")
class Tokens(SingleLabel):
    """One class for each token, or each word by its first: targets `b n`, `IGNORED` where a token has none."""

    pool = "all"

    # None, and it is refused: a text has tokens of several classes.
    groups = Problem.groups


def to_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """`softmax(logits / temperature)` over the last axis, in float32."""
    # In half precision probabilities are coarse and do not sum to one.
    return (logits.float() / temperature).softmax(-1)


def weigh_inversely(counts: Tensor) -> Tensor:
    """`n / (C n_c)`, C the classes that are there; 1 of those that are not."""
    there = counts > 0
    weights = counts.sum() / (there.sum() * counts.clamp(min=1))
    return torch.where(there, weights, 1.0)


def find_problem(task: Any) -> Problem:
    """What a task says that it answers; one class of several where it says nothing, as a module of one's own."""
    said = getattr(task, "problem", None)
    return said if isinstance(said, Problem) else SingleLabel()
