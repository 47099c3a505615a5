"""A problem: what targets look like, what is minimised and measured, and how logits become answers.

A new one is one class with `@problem("kind")` above it, or a class of an installed package that is named
by an entry point `restuning.problems`. Training, evaluation, the closed form, files, banks and
predictors ask for what stands here and for nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from restuning._errors import FormatError, TrainingError
from restuning._registry import Registry, construct, read_arguments
from restuning.problems.judge import Judge
from restuning.problems.meters import collect as collect
from restuning.problems.meters import read_meter as read_meter
from restuning.problems.meters import read_meters as read_meters

Shown = Callable[[int], str]
"""What the target of a number is called in an error: its file and row."""

Box = tuple[int, int, int, int]
"""Left, top, right and bottom of a part of an image, in pixels; the last two are beyond it."""


class Problem(ABC):
    """One kind of answer. Without state, but for numbers that a task file keeps (`spec`).

    Subclasses keep every constructor argument as an attribute of the same name and put `@problem("kind")`
    above the class. Two of one kind and arguments are equal.

    Shape:
        logits: `b c`, one number an output; `b n c` where each token is answered, `b h w c` where each place
            is. Outputs come last; of the other axes only its own methods know.
        targets: whatever the kind says, one an example along the first axis.

    Attributes:
        kind: Its name in the table, in the field's own words.
        metric: Key in `metrics` of the one figure that is shown and compared while training and choosing.
            Higher is better.
        percent: Whether that figure is a share, which people read in percent.
        counted: Whether it is a mean over examples of the second number of `score`, so that it needs no
            `metrics`.
        loss_name: What is minimised, in words.
        noun: What one output stands for, in the plural.
        one_hot: Whether a target is the number of the one output that is wanted.
        judges_feature: Whether the backbone's feature, as it is, is an answer of this kind, so that its figures are told
            beside those of a task.
        beside: Whether targets are kept beside stored features: a store holds whole numbers, one an input.
        pool: The readout that it asks for, one of `POOLS`; None for the backbone's own.
        batch_size: Examples of a training step where nobody says; None for what is usual.
        pipeline_tags: What a hub calls it, by what inputs are ("image", "audio", "text" or "words"); none for what it has no
            word for.
        prints: What the lines of a card print of an `answer`.
    """

    kind: ClassVar[str] = ""
    metric: ClassVar[str]
    percent: ClassVar[bool] = True
    counted: ClassVar[bool] = False
    loss_name: ClassVar[str]
    noun: ClassVar[str] = "classes"
    one_hot: ClassVar[bool] = False
    judges_feature: ClassVar[bool] = False
    beside: ClassVar[bool] = True
    pool: ClassVar[str | None] = None
    batch_size: ClassVar[int | None] = None
    pipeline_tags: ClassVar[Mapping[str, str]] = {}
    prints: ClassVar[str] = "answer.label"

    # One without arguments must say so: a spec is read off this signature.
    def __init__(self) -> None:  # noqa: B027
        pass

    def outputs(self, labels: Sequence[str]) -> int:
        """How many numbers a head gives, where its outputs have these names."""
        return len(labels)

    def check_outputs(self, outputs: int) -> None:  # noqa: B027
        """Refuse a head that gives another number of outputs than this problem has numbers for.

        Raises:
            FormatError: It does.
        """

    def describe(self, labels: Sequence[str]) -> str:
        """What is asked, in a few words: "7 classes"."""
        return f"{self.outputs(labels)} {self.noun}"

    # Targets.

    @abstractmethod
    def check_targets(
        self, targets: Any, outputs: int | None = None, shown: Shown | None = None
    ) -> None:
        """Refuse targets that this problem cannot be trained or judged on.

        Args:
            targets: Of a batch or of a whole split.
            outputs: Numbers that a head gives; None where that is not known yet.
            shown: Names the target at a place, for the error.

        Raises:
            TrainingError: They are of another kind or shape, are not finite, or lie beyond the outputs.
        """

    @abstractmethod
    def stand_in(self, logits: Tensor) -> Tensor:
        """Targets of the right form that mean nothing, for forecasts from shapes."""

    def mirror(self, targets: Tensor) -> Tensor:
        """The targets of mirror images (left and right exchanged), `b ...`: the same, unless they have places."""
        return targets

    # What is minimised.

    @abstractmethod
    def loss(self, logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """The sum over examples of what is minimised."""

    @abstractmethod
    def losses_of_several(self, logits: Tensor, targets: Tensor, smoothing: Tensor) -> Tensor:
        """Mean losses of k runs on one batch, `k b c` and `k 1` to `k`, each with its own smoothing."""

    def score(
        self, logits: Tensor, targets: Tensor, smoothing: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Sums over examples of the loss and, where `metric` is `counted`, of that; else of zeros."""
        loss = self.loss(logits, targets, smoothing)
        return loss, torch.zeros_like(loss)

    # Where some outputs are rare.

    def counts(self, targets: Tensor, outputs: int) -> Tensor | None:
        """How many examples have each output, `c`; None where an output is nothing that an example has."""
        return None

    def balance(self, targets: Tensor, outputs: int) -> Tensor:
        """Weights for `weighted_loss` with which all that is answered counts alike, however rare.

        Args:
            targets: Of the whole training split.
            outputs: Numbers that a head gives.

        Raises:
            TrainingError: Answers are nothing that could be rare.
        """
        raise cannot_balance(self.kind, "class_weights")

    def weighted_loss(
        self, logits: Tensor, targets: Tensor, weights: Tensor, smoothing: float = 0.0
    ) -> Tensor:
        """As `loss`, each answer's times the weight of what it should have been (`balance`)."""
        raise cannot_balance(self.kind, "class_weights")

    def groups(self, targets: Tensor, outputs: int) -> list[Tensor]:
        """Numbers of examples in groups, of each of which balanced sampling takes as many; a group may be empty.

        Raises:
            TrainingError: Answers are nothing that could be rare.
        """
        raise cannot_balance(self.kind, "balanced_sampling")

    # Figures.

    @abstractmethod
    def metrics(self, outputs: int) -> Any:
        """A new `torchmetrics.MetricCollection`, which takes logits and targets; `metric` is a key of it.

        It exchanges nothing between processes by itself.
        """

    def tell(self, figure: float | None) -> str:
        """Its metric in words: `accuracy 94.29%`, `r2 0.873`."""
        return f"{self.metric.replace('_', ' ')} {self.show(figure)}"

    def show(self, figure: float | None) -> str:
        """A value of its metric as people read it; "-" of none."""
        if figure is None:
            return "-"
        return f"{figure:.2%}" if self.percent else f"{figure:.3f}"

    def measure(self, logits: Tensor, targets: Tensor) -> float | None:
        """The `metric` of a whole split; None where it is not defined."""
        meter = self.metrics(logits.shape[-1])[self.metric]
        meter.update(logits, targets)
        return read_meter(meter)

    def judge(self, labels: Sequence[str], temperature: float = 1.0) -> Judge:
        """A new judge of answers to a split: what they are worth, in figures, tables and pictures.

        Args:
            labels: Names of outputs.
            temperature: That probabilities are told at.
        """
        return Judge(self, labels, temperature)

    # Answers.

    @abstractmethod
    def values(self, logits: Tensor, temperature: float = 1.0) -> Tensor:
        """What is told of logits, `... c`: a probability for each label, or numbers in their units."""

    @abstractmethod
    def answer(self, values: Tensor, logits: Tensor, labels: Sequence[str]) -> Any:
        """One answer, of one row of `values` and of the logits behind it, `c` on the CPU."""

    def on_image(self, answer: Any, size: tuple[int, int], seen: Box) -> Any:
        """An answer as it lies on its image: the same, unless it has places.

        Args:
            answer: Of `answer`.
            size: Height and width of the image, in its own pixels.
            seen: What the backbone was shown of it, in these.
        """
        return answer

    def choices(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor] | None:
        """Answers as choices among classes, `m k` and `m`, of which temperatures and calibration errors are.

        None where answers are no choices.
        """
        return None

    @property
    def chooses(self) -> bool:
        """Whether answers are choices, which have probabilities."""
        return type(self).choices is not Problem.choices

    def thin(self, logits: Tensor, targets: Tensor) -> tuple[Problem, Tensor, Tensor] | None:
        """A problem, logits and targets that say as much of a batch in fewer numbers: what parts of an ensemble are weighed on.

        The same, where an example has one answer. None where there is nothing to be weighed on.
        """
        return self, logits, targets

    # The closed form.

    @abstractmethod
    def columns(self, targets: Tensor, outputs: int) -> Tensor:
        """Targets as what a linear map is fitted to, `n c` in double."""

    def from_columns(self, columns: Tensor) -> Tensor:
        """Targets of columns, as `columns` made them."""
        return columns.float()

    def logits_of_means(self, means: Tensor, count: Tensor, middle: Tensor) -> Tensor:
        """Logits that say means of columns, as of a row's neighbours, `b c`.

        Args:
            means: `b c`.
            count: How many votes each is of, `b 1`.
            middle: Mean of the columns over all rows, `c`: what one vote more says, so that no vote is not none.
        """
        return means

    def mean_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean over examples of `loss`."""
        return self.loss(logits, targets) / len(logits)

    @property
    def scales(self) -> Sequence[float]:
        """Factors that are tried to turn such fits into logits; of one nothing is chosen."""
        return (1.0,)

    def offset(self, middle: Tensor, count: int, scale: float) -> Tensor:
        """What is added to scaled fits to make them logits, `c`.

        Args:
            middle: Mean of the columns, `c`.
            count: Rows that it is of.
            scale: The factor.
        """
        return torch.zeros_like(middle)

    @abstractmethod
    def surprise(self, outputs: int) -> float:
        """About the loss of an answer that knows nothing."""

    @abstractmethod
    def gradient(self, logits: Tensor, columns: Tensor) -> Tensor:
        """Of each row's loss, by its logits, `n c`."""

    # What is held out may tell more.

    def with_errors(self, logits: Tensor, targets: Tensor) -> Problem:
        """The same with error bars that follow from answers to rows that were not trained on."""
        return self

    def with_errors_of(self, other: Problem) -> Problem:
        """The same with the error bars of another one of its kind."""
        return self

    def without_errors(self) -> Problem:
        """The same before anything was trained."""
        return self

    # Files.

    def spec(self) -> dict[str, Any]:
        """Everything needed to build it again, as JSON."""
        own = {n: v for n, v in read_arguments(self, _to_json).items() if v is not None}
        return {"kind": self.kind, **own}

    def __eq__(self, other: object) -> bool:
        """Equal kinds and arguments."""
        return isinstance(other, Problem) and self.spec() == other.spec()

    def __hash__(self) -> int:
        """Of the kind: arguments may be long."""
        return hash(self.kind)

    def __repr__(self) -> str:
        """The kind and arguments."""
        told = ", ".join(f"{n}={v!r}" for n, v in self.spec().items() if n != "kind")
        return f"{type(self).__name__}({told})"


_REGISTRY: Registry[Problem] = Registry("problem", "restuning.problems")

problem = _REGISTRY.register
"""Enter a problem in the table that specs are read from: `@problem("kind")`."""


def kinds() -> dict[str, type[Problem]]:
    """The table of problems: ours, and those that installed packages give by entry point."""
    return _REGISTRY.kinds()


def from_spec(spec: Mapping[str, Any]) -> Problem:
    """Build a problem from its `spec`.

    Raises:
        UnknownNameError: The kind is in no table.
        FormatError: The arguments do not fit the kind.
    """
    cls = _REGISTRY.find(spec)
    return construct(cls, {k: v for k, v in spec.items() if k != "kind"}, "problem")


def refuse_arguments(kind: str, found: str) -> FormatError:
    """The error of a problem that is built from numbers that do not fit."""
    return FormatError(
        "a problem cannot be built",
        where=kind,
        found=found[:200],
        fix="give what `Problem.spec` writes; of a file, restore task.json from where it was saved",
    )


def cannot_balance(kind: str, setting: str) -> TrainingError:
    """The error of a problem that knows no rare answers."""
    return TrainingError(
        "rare answers are made to count as much as frequent ones where answers are classes or labels",
        where=setting,
        found=f"problem {kind}",
        fix=f"leave out --{setting.replace('_', '-')}",
    )


def _to_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
