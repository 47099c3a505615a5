"""Numbers in place of classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from restuning._errors import TrainingError
from restuning.problems.answers import Number, NumbersAnswer
from restuning.problems.judge_numbers import JudgeOfNumbers
from restuning.problems.problem import Problem, Shown, collect, problem, refuse_arguments
from restuning.problems.targets import check_floats, refuse_smoothing


@problem("regression")
class Regression(Problem):
    """One number or several an input. Targets are `b c` in floating point, in their own units.

    A head answers standardised numbers, `(y - mean) / deviation`, so that all numbers count alike in the loss,
    the mean over numbers of squared errors, and none decides the learning rate. Answers are brought back
    to their units, with the deviation of the errors that were made on rows left out (`error`).

    Args:
        mean: Of each number over the training rows.
        deviation: Likewise; of a number that never changes 1.
        error: Root of the mean squared error on rows that were not trained on, in units; None where
            there were none.

    Raises:
        FormatError: Their numbers differ, or one is not finite; a deviation is not above zero.
    """

    metric = "r2"
    prints = "answer.label, answer.value"
    percent = False
    loss_name = "mean squared error (standardised)"
    noun = "numbers"

    def __init__(
        self,
        mean: Sequence[float],
        deviation: Sequence[float],
        error: Sequence[float] | None = None,
    ) -> None:
        self.mean, self.deviation = tuple(mean), tuple(deviation)
        self.error = None if error is None else tuple(error)
        several = [self.mean, self.deviation, *([self.error] if self.error is not None else [])]
        finite = all(math.isfinite(x) for each in several for x in each)
        if not self.mean or len({len(each) for each in several}) > 1 or not finite:
            raise refuse_arguments(self.kind, f"{several}")
        if min(self.deviation) <= 0 or min(self.error or (0.0,)) < 0:
            raise refuse_arguments(self.kind, f"deviations {self.deviation}, errors {self.error}")

    @classmethod
    def of(cls, targets: Tensor) -> Regression:
        """The problem of these training targets, `n c`.

        Raises:
            TrainingError: One is not finite, or there are none.
        """
        check_floats(targets, None, None, _WANTED, _ONE)
        if not len(targets):
            raise TrainingError("there is nothing to train on", found="no targets")
        y = targets.double()
        deviation = y.std(0, correction=0)
        # Of what never changes nothing is learned, whatever it is divided by.
        deviation = torch.where(deviation > 1e-12 * y.abs().amax(0), deviation, 1.0)
        return cls(y.mean(0).tolist(), deviation.tolist())

    def check_outputs(self, outputs: int) -> None:
        """Refuse a head of other than `c` outputs: one mean would be added to all of them.

        Raises:
            FormatError: It is one.
        """
        if outputs != len(self.mean):
            raise refuse_arguments(
                self.kind, f"{len(self.mean)} means, and a head of {outputs} outputs"
            )

    def check_targets(
        self, targets: Any, outputs: int | None = None, shown: Shown | None = None
    ) -> None:
        """Refuse what is no finite number for each output.

        Raises:
            TrainingError: Another kind or shape, NaN or infinity.
        """
        check_floats(targets, outputs or len(self.mean), shown, _WANTED, _ONE)

    def stand_in(self, logits: Tensor) -> Tensor:
        """The mean of each."""
        return torch.zeros_like(logits, dtype=torch.float32) + self._of(logits, self.mean)

    def standardise(self, targets: Tensor) -> Tensor:
        """`(y - mean) / deviation`, `... c`."""
        mean, deviation = (self._of(targets, each) for each in (self.mean, self.deviation))
        return (targets - mean) / deviation

    def loss(self, logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """The sum over examples of the mean over numbers of squared standardised errors.

        Raises:
            TrainingError: Labels shall be smoothed, which numbers are not.
        """
        refuse_smoothing(smoothing, self.kind)
        return (logits - self.standardise(targets).to(logits.dtype)).square().mean(-1).sum()

    def losses_of_several(self, logits: Tensor, targets: Tensor, smoothing: Tensor) -> Tensor:
        """As `loss`, the mean over examples, of every run."""
        refuse_smoothing(float(smoothing.max()), self.kind)
        return (logits - self.standardise(targets).to(logits.dtype)).square().mean((1, 2))

    def metrics(self, outputs: int) -> Any:
        """`r2`, `mae` and `rmse`, in units and means over numbers (of `rmse` the root of the mean square)."""
        from torchmetrics import MeanAbsoluteError, MeanSquaredError, R2Score

        problem = self

        class Standardised(R2Score):
            def update(self, logits: Tensor, targets: Tensor) -> None:
                # The same share of variance; sums of squares of large numbers would lose it.
                super().update(logits.float().contiguous(), problem.standardise(targets).float())

        def in_units(kind: Any, **options: Any) -> Any:
            class InUnits(kind):
                def update(self, logits: Tensor, targets: Tensor) -> None:
                    super().update(problem.values(logits).contiguous(), targets.float())

            return InUnits(sync_on_compute=False, **options)

        return collect(
            {
                "r2": Standardised(multioutput="uniform_average", sync_on_compute=False),
                "mae": in_units(MeanAbsoluteError),
                "rmse": in_units(MeanSquaredError, squared=False),
            }
        )

    def judge(self, labels: Sequence[str], temperature: float = 1.0) -> JudgeOfNumbers:
        """See `JudgeOfNumbers`."""
        return JudgeOfNumbers(self, labels, temperature)

    def values(self, logits: Tensor, temperature: float = 1.0) -> Tensor:
        """Numbers in their units; a temperature means nothing here."""
        z = logits.float()
        return z * self._of(z, self.deviation) + self._of(z, self.mean)

    def answer(self, values: Tensor, logits: Tensor, labels: Sequence[str]) -> NumbersAnswer:
        """Each number with its name and its error."""
        errors = self.error or (None,) * len(labels)
        told = zip(labels, values.tolist(), errors, strict=True)
        return NumbersAnswer(tuple(Number(*each) for each in told))

    def columns(self, targets: Tensor, outputs: int) -> Tensor:
        """Standardised."""
        return self.standardise(targets.double())

    def from_columns(self, columns: Tensor) -> Tensor:
        """In their units."""
        back = columns * self._of(columns, self.deviation) + self._of(columns, self.mean)
        return back.float()

    def surprise(self, outputs: int) -> float:
        """The variance of what is standardised."""
        return 1.0

    def gradient(self, logits: Tensor, columns: Tensor) -> Tensor:
        """Of the mean of squares."""
        return 2 * (logits - columns) / columns.shape[1]

    def with_errors(self, logits: Tensor, targets: Tensor) -> Regression:
        """The same with the root of the mean squared error of these answers."""
        if not len(logits):
            return self
        off = self.values(logits.cpu()).double() - targets.cpu().double()
        return Regression(self.mean, self.deviation, off.square().mean(0).sqrt().tolist())

    def with_errors_of(self, other: Problem) -> Regression:
        """The same with the error bars of another one of its kind."""
        error = other.error if isinstance(other, Regression) else None
        return Regression(self.mean, self.deviation, error)

    def without_errors(self) -> Regression:
        """The same without error bars."""
        return self if self.error is None else Regression(self.mean, self.deviation)

    def describe(self, labels: Sequence[str]) -> str:
        """The names of the numbers, up to four."""
        more = "" if len(labels) < 5 else f" and {len(labels) - 4} more"
        return f"{len(labels)} number{'s' * (len(labels) > 1)} ({', '.join(labels[:4])}{more})"

    def _of(self, like: Tensor, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device)


_WANTED, _ONE = "numbers, one or several an example", "each output"
