"""A vector in place of an answer: examples of one class shall be near each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from restuning.problems.answers import VectorAnswer
from restuning.problems.judge_vectors import JudgeOfVectors
from restuning.problems.problem import Problem, Shown, collect, problem, refuse_arguments
from restuning.problems.prototypes import find_prototypes
from restuning.problems.retrieval import make_meters, recall_at
from restuning.problems.single_label import SingleLabel

DIMENSIONS = 512
"""Most of what nobody asked for, as in Zhai and Wu (2019) and Kim et al. (2020)."""

TEMPERATURE = 0.1
"""What cosines are divided by: of 0.02 to 0.2 the best on validation splits (`recipes/retrieval.json`), and Khosla et al.'s (2020)."""

SHORT = 0.1
"""Length below which a vector's direction counts less and less: of none there is no direction to learn from."""

MOST = 2**20
"""Classes and dimensions: a damaged file would else ask for all memory there is."""

_CLASSES = SingleLabel()


@problem("embedding")
class Embedding(Problem):
    r"""A vector an input, `b d`, of unit length; targets are classes, whole numbers `b`, of which no answer is given.

    It is trained by the normalised softmax `-log softmax_c(cos(z, p_c) / T)[y]` (Wang et al. 2017; Zhai and Wu 2019: a
    strong baseline of metric learning) on prototypes p that are not learned but as far apart as can be (Mettes et al.
    2019). With free features learned prototypes end as just these, a regular simplex (Papyan et al. 2020). So the loss is one of an
    example and not of a batch, as a contrastive one is: it does not change with batch size, accumulation or processes, it holds
    in closed form and by steps, and a task keeps nothing but the map.

    Judged by retrieval: each example of a split is a query, those of its class are relevant, and it does not find itself.

    Args:
        classes: C, of the training data.
        dimensions: d. More than C - 1 hold nothing more: prototypes then lie in C - 1 of them. In fewer, classes are placed
            without regard to which are alike, and recall falls (`recipes/retrieval.json`: 100 classes in 32 dimensions).

    Raises:
        FormatError: One is below 1 or beyond `MOST`.
    """

    metric = "recall_at_1"
    pipeline_tags = {"image": "image-feature-extraction", "text": "feature-extraction"}
    prints = "answer.vector"
    loss_name = "cross entropy of cosines with prototypes"
    noun = "dimensions"
    beside = False
    judges_feature = True

    def __init__(self, classes: int, dimensions: int) -> None:
        self.classes, self.dimensions = classes, dimensions
        if not 1 <= min(classes, dimensions) <= max(classes, dimensions) <= MOST:
            raise refuse_arguments(self.kind, f"{classes} classes, {dimensions} dimensions")

    @classmethod
    def of(cls, labels: Sequence[str], dimensions: int | None = None) -> Embedding:
        """The problem of data of these classes; of no dimensions as many as there are classes, 512 at most."""
        return cls(len(labels), min(DIMENSIONS, len(labels)) if dimensions is None else dimensions)

    def outputs(self, labels: Sequence[str]) -> int:
        """The dimensions, however many classes there are."""
        return self.dimensions

    def check_outputs(self, outputs: int) -> None:
        """Refuse a head of another width.

        Raises:
            FormatError: It is one.
        """
        if outputs != self.dimensions:
            raise refuse_arguments(
                self.kind, f"{self.dimensions} dimensions, and a head of {outputs} outputs"
            )

    def describe(self, labels: Sequence[str]) -> str:
        """Dimensions and classes."""
        return f"{self.dimensions} dimensions for {len(labels)} classes"

    def check_targets(
        self, targets: Any, outputs: int | None = None, shown: Shown | None = None
    ) -> None:
        """Refuse what are no whole numbers, one an example, and a class beyond the training data's.

        Raises:
            TrainingError: They are something else.
        """
        _CLASSES.check_targets(targets, self.classes, shown)

    def stand_in(self, logits: Tensor) -> Tensor:
        """The first class."""
        return _CLASSES.stand_in(logits)

    def _scores(self, logits: Tensor) -> Tensor:
        """Cosines with the prototypes over the temperature, `... C`."""
        # Of a vector of no length the gradient would be infinite.
        length = (logits.square().sum(-1, keepdim=True) + SHORT**2).sqrt()
        prototypes = find_prototypes(self.classes, self.dimensions).to(logits)
        return (logits / length) @ prototypes.T / TEMPERATURE

    def loss(self, logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """The sum over examples of the cross entropy; see the class."""
        return _CLASSES.loss(self._scores(logits), targets, smoothing)

    def losses_of_several(self, logits: Tensor, targets: Tensor, smoothing: Tensor) -> Tensor:
        """Likewise, the mean over examples of every run."""
        return _CLASSES.losses_of_several(self._scores(logits), targets, smoothing)

    def counts(self, targets: Tensor, outputs: int) -> Tensor:
        """Examples of each class."""
        return _CLASSES.counts(targets, self.classes)

    def balance(self, targets: Tensor, outputs: int) -> Tensor:
        """As of classes."""
        return _CLASSES.balance(targets, self.classes)

    def weighted_loss(
        self, logits: Tensor, targets: Tensor, weights: Tensor, smoothing: float = 0.0
    ) -> Tensor:
        """As `loss`, each times the weight of its class."""
        return _CLASSES.weighted_loss(self._scores(logits), targets, weights, smoothing)

    def groups(self, targets: Tensor, outputs: int) -> list[Tensor]:
        """The examples of each class."""
        return _CLASSES.groups(targets, self.classes)

    def metrics(self, outputs: int) -> Any:
        """`recall_at_1`, `recall_at_5` and `mean_average_precision`; see `retrieval`."""
        return collect(make_meters())

    def measure(self, logits: Tensor, targets: Tensor) -> float | None:
        """`recall_at_1`."""
        found = recall_at(logits, targets, 1)
        return found if found == found else None

    def judge(self, labels: Sequence[str], temperature: float = 1.0) -> JudgeOfVectors:
        """See `JudgeOfVectors`."""
        return JudgeOfVectors(self, labels, temperature)

    def values(self, logits: Tensor, temperature: float = 1.0) -> Tensor:
        """At unit length; a temperature means nothing here."""
        return F.normalize(logits.float(), dim=-1)

    def answer(self, values: Tensor, logits: Tensor, labels: Sequence[str]) -> VectorAnswer:
        """The vector."""
        return VectorAnswer(values)

    def columns(self, targets: Tensor, outputs: int) -> Tensor:
        """Each class as its prototype."""
        return find_prototypes(self.classes, self.dimensions).to(targets.device)[targets]

    def from_columns(self, columns: Tensor) -> Tensor:
        """The class of the nearest prototype."""
        return (columns @ find_prototypes(self.classes, self.dimensions).to(columns).T).argmax(1)

    def surprise(self, outputs: int) -> float:
        """`log C`."""
        return _CLASSES.surprise(self.classes)

    def gradient(self, logits: Tensor, columns: Tensor) -> Tensor:
        """By torch: cosines are no linear map of logits."""
        with torch.enable_grad():
            given = logits.detach().requires_grad_()
            loss = self.loss(given, self.from_columns(columns))
            return torch.autograd.grad(loss, given)[0]
