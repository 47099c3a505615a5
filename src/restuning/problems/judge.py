"""Takes in answers to a split batch by batch, and tells in the end what they are worth."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from restuning.problems.judged import WORST, Breakdown, Judged, Mistake, Picture
from restuning.problems.meters import read_meters

if TYPE_CHECKING:
    from restuning.problems.problem import Problem


class _WithLoss(Protocol):
    @property
    def loss(self) -> float:
        """Of an answer."""
        ...


SHOWN = 512
"""Pixels along a side of a map that is kept to be shown; on a page it is smaller."""

K = TypeVar("K", bound=_WithLoss)


class Judge:
    """Judges any problem by its `metrics` and losses; a problem that has more to tell gives one of its own (`Problem.judge`).

    Args:
        problem: Whose answers they are.
        labels: Names of outputs.
        temperature: That probabilities are told at.

    Cost: of this one a loss an example; those of single labels, several labels and numbers hold all logits of the split, `n c`.
    """

    def __init__(self, problem: Problem, labels: Sequence[str], temperature: float = 1.0) -> None:
        self.problem, self.labels, self.temperature = problem, [str(x) for x in labels], temperature
        self._meters: Any = None
        self._losses: list[float] = []

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Take in a batch.

        Args:
            logits: `b c`, or of another kind's shape.
            targets: As the problem has them.
        """
        if self._meters is None:
            outputs = self.problem.outputs(self.labels) or logits.shape[-1]
            self._meters = self.problem.metrics(outputs).to(logits.device)
        self._meters.update(logits, targets)
        for one, wanted in zip(logits.split(1), targets.split(1), strict=True):
            self._losses.append(float(self.problem.loss(one, wanted)))

    def conclude(self) -> Judged:
        """What the answers so far are worth."""
        figures = {} if self._meters is None else read_meters(self._meters)
        worst = [Mistake(n, "", "", self._losses[n]) for n in largest(torch.tensor(self._losses))]
        rows = [{"loss": loss} for loss in self._losses]
        shares = [self.problem.metric] if self.problem.percent else []
        return Judged(len(self._losses), figures, shares=shares, worst=worst, rows=rows)


class JudgeOfLogits(Judge, ABC):
    """One that holds all logits and targets, on the CPU, and is asked for each part of what it tells."""

    def __init__(self, problem: Problem, labels: Sequence[str], temperature: float = 1.0) -> None:
        super().__init__(problem, labels, temperature)
        self._given: list[tuple[Tensor, Tensor]] = []

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Take in a batch; see the class."""
        if len(logits):
            # At once: the logits of a whole split may not fit beside the backbone.
            self._given.append((logits.detach().float().cpu(), targets.cpu()))

    def conclude(self) -> Judged:
        """What the answers so far are worth."""
        if not self._given:
            return Judged(0, {})
        logits, targets = (torch.cat(each) for each in zip(*self._given, strict=True))
        constant = self.answer_constantly(targets)
        losses = self.losses(logits, targets)
        wrong = self.find_wrong(logits, targets)
        at = torch.arange(len(logits)) if wrong is None else wrong.nonzero()[:, 0]
        worst = at[largest(losses[at])] if len(at) else at
        rows = self.rows(logits, targets, losses)
        return Judged(
            len(logits),
            self.figures(logits, targets),
            {} if constant is None else self.constant_figures(constant, targets),
            self.shares,
            self.breakdown(logits, targets),
            self.pictures(logits, targets),
            [self.mistake(n, logits, targets, float(losses[n])) for n in worst.tolist()],
            None if wrong is None else len(at),
            rows,
        )

    def mistake(self, row: int, logits: Tensor, targets: Tensor, loss: float) -> Mistake:
        """What was answered to an example and what is true, in words."""
        values = self.problem.values(logits[row], self.temperature)
        told = self.problem.answer(values, logits[row], self.labels).words()[0]
        return Mistake(row, told, self.say(targets[row]), loss)

    shares: Sequence[str] = ()

    @abstractmethod
    def figures(self, logits: Tensor, targets: Tensor) -> dict[str, float | None]:
        """By name."""

    def constant_figures(self, logits: Tensor, targets: Tensor) -> dict[str, float | None]:
        """Those of what `answer_constantly` gave."""
        return self.figures(logits, targets)

    def answer_constantly(self, targets: Tensor) -> Tensor | None:
        """Logits of the best answer that is the same for all, `n c`; None where there is none."""
        return None

    @abstractmethod
    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Of each answer, `n`."""

    def find_wrong(self, logits: Tensor, targets: Tensor) -> Tensor | None:
        """Which answers are mistakes, `n`; None where they are near or far."""
        return None

    def breakdown(self, logits: Tensor, targets: Tensor) -> Breakdown | None:
        """Figures of each output."""
        return None

    def pictures(self, logits: Tensor, targets: Tensor) -> list[Picture]:
        """In the order they are shown."""
        return []

    @abstractmethod
    def say(self, target: Tensor) -> str:
        """What a target stands for, in words."""

    @abstractmethod
    def rows(self, logits: Tensor, targets: Tensor, losses: Tensor) -> list[Mapping[str, Any]]:
        """What was true and what was answered, of every example."""


class JudgeOfPixels(Judge, ABC):
    """One of answers to every pixel, which may be large and are then taken in some rows at a time."""

    @abstractmethod
    def update_in_rows(self, parts: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Take in one image.

        Args:
            parts: From its top on: logits of some rows of pixels, `r W c`, and their targets, `r W`. One part or more.

        Cost: of the answer what is shown of it is held, at most `SHOWN` pixels along each side where it is among the worst.
        """


def thin_map(pixels: Tensor) -> Tensor:
    """Every n-th pixel of a map, `H W`, so that none of its sides is longer than `SHOWN`."""
    step = max(1, -(-max(pixels.shape) // SHOWN))
    return pixels[::step, ::step].clone() if step > 1 else pixels


def largest(losses: Tensor, most: int = WORST) -> list[int]:
    """Places of the largest, the first of equals first."""
    return losses.argsort(descending=True, stable=True)[:most].tolist()


def keep_worst(kept: Sequence[K]) -> list[K]:
    """Those with the largest `loss`, `WORST` at most, the worst first."""
    return [kept[n] for n in largest(torch.tensor([each.loss for each in kept]))]


def to_floats(values: Tensor) -> list[float | None]:
    """Values of a table; None of one that is no number."""
    return [value if value == value else None for value in values.tolist()]


def mean_of(values: Tensor) -> float | None:
    """The mean of those that are numbers; None where none is."""
    known = values[values.isfinite()]
    return float(known.mean()) if len(known) else None
