"""A number for every pixel, such as its distance, answered on a coarser grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from restuning._errors import TrainingError
from restuning.problems.answers import DepthAnswer
from restuning.problems.judge_depths import JudgeOfDepths
from restuning.problems.meters import collect
from restuning.problems.pixels import (
    OfPixels,
    enlarge,
    mean_of_images,
    patches_of,
    take_middles,
    thin_out,
)
from restuning.problems.problem import Problem, Shown, problem, refuse_arguments
from restuning.problems.regression import Regression
from restuning.problems.targets import refuse_first, refuse_smoothing, tell_form

NEAR = 1.25
"""Of `delta_1`: an answer and the truth differ by less than this factor."""


@problem("depth")
class Depth(OfPixels):
    """One number above zero a pixel. Targets are `b H W` in floating point, in their own units; 0 and NaN are unknown.

    A head answers standardised numbers, `(y - mean) / deviation`, as of a `regression`, on a grid that is brought to the size of
    the target bilinearly. The loss is the squared error of these, for each image the mean over its known pixels, so that an image
    counts as one. Answers are brought back to units and are not kept from falling below zero.

    Args:
        mean, deviation: Of the known pixels of the training images, each image counted as one.
        error: Root of the mean squared error on images that were not trained on, in units; None where there were none.
        window: As of `OfPixels`.

    Raises:
        FormatError: One is not finite; the deviation is not above zero.

    Cost: of a step about four numbers a pixel.
    """

    metric = "r2"
    pipeline_tags = {"image": "depth-estimation"}
    prints = "answer.label, answer.depth.shape"
    percent = False
    loss_name = "mean squared error (standardised) of pixels"
    noun = "numbers a pixel"

    def __init__(
        self,
        mean: float,
        deviation: float,
        error: float | None = None,
        window: Sequence[int] | None = None,
    ) -> None:
        super().__init__(window)
        self.mean, self.deviation, self.error = mean, deviation, error
        told = (mean, deviation, 0.0 if error is None else error)
        if not all(map(math.isfinite, told)) or deviation <= 0 or told[2] < 0:
            raise refuse_arguments(self.kind, f"mean {mean}, deviation {deviation}, error {error}")

    @classmethod
    def of(
        cls, moments: Sequence[tuple[float, float]], window: Sequence[int] | None = None
    ) -> Depth:
        """The problem of training images.

        Args:
            moments: Of each image the mean of its known pixels and that of their squares.
            window: As of `OfPixels`.

        Raises:
            TrainingError: There are none.
        """
        if not moments:
            raise TrainingError("there is nothing to train on", found="no image with a known pixel")
        mean, square = torch.tensor(moments, dtype=torch.double).mean(0).tolist()
        variance = square - mean**2
        # Of what never changes nothing is learned, whatever it is divided by.
        deviation = math.sqrt(variance) if variance > 1e-12 * square else 1.0
        return cls(mean, deviation, window=window)

    def check_outputs(self, outputs: int) -> None:
        """Refuse a head of several outputs: a pixel has one number.

        Raises:
            FormatError: It has.
        """
        if outputs != 1:
            raise refuse_arguments(self.kind, f"a head of {outputs} outputs, a pixel has one")

    def check_targets(
        self, targets: Any, outputs: int | None = None, shown: Shown | None = None
    ) -> None:
        """Refuse what are no numbers of pixels, numbers below zero and infinity.

        Raises:
            TrainingError: One is there.
        """
        if (
            not isinstance(targets, Tensor)
            or targets.ndim != 3
            or not targets.is_floating_point()
            or outputs not in (None, 1)
        ):
            raise TrainingError(
                "depths must be numbers in floating point, one a pixel",
                found=tell_form(targets),
                fix="let the data set yield (image, tensor `h w` of floats), 0 or NaN where there is none",
            )
        refuse_first(
            (targets < 0) | targets.isinf(),
            targets,
            shown,
            "a pixel of a depth is below zero, or infinite",
            "correct it, 0 or NaN where it is unknown",
        )

    def known(self, targets: Tensor) -> Tensor:
        """Those above zero; NaN is not."""
        return targets > 0

    def stand_in(self, logits: Tensor) -> Tensor:
        """One everywhere, in patches of 16 pixels."""
        return torch.ones(len(logits), *patches_of(logits), device=logits.device)

    def standardise(self, targets: Tensor) -> Tensor:
        """`(y - mean) / deviation`, and 0 where it is unknown."""
        return torch.where(self.known(targets), (targets - self.mean) / self.deviation, 0.0)

    def loss(self, logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """The sum over images of the mean over known pixels of squared standardised errors.

        Raises:
            TrainingError: Labels shall be smoothed, which numbers are not.
        """
        refuse_smoothing(smoothing, self.kind)
        known = self.known(targets)
        off = enlarge(logits, targets)[:, 0] - self.standardise(targets).to(logits.dtype)
        return mean_of_images(off.square() * known, known)

    def metrics(self, outputs: int) -> Any:
        """`r2`, `rmse`, `mae`, `abs_rel` (the mean of `|error| / truth`) and `delta_1` (the share within a factor of 1.25), over all
        known pixels.
        """
        from torchmetrics import (
            MeanAbsoluteError,
            MeanAbsolutePercentageError,
            MeanMetric,
            MeanSquaredError,
            R2Score,
        )

        made = self

        def of_known(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            known = made.known(targets)
            return made.values(enlarge(logits, targets)[:, 0])[known], targets[known].float()

        def in_units(kind: Any, **options: Any) -> Any:
            class InUnits(kind):
                def update(self, logits: Tensor, targets: Tensor) -> None:
                    answers, truth = of_known(logits, targets)
                    if len(truth):
                        super().update(answers, truth)

            return InUnits(sync_on_compute=False, **options)

        class Standardised(R2Score):
            def update(self, logits: Tensor, targets: Tensor) -> None:
                known = made.known(targets)
                if known.any():
                    # The same share of variance; sums of squares of large numbers would lose it.
                    own = enlarge(logits, targets)[:, 0][known].float()
                    super().update(own, made.standardise(targets)[known].float())

        class Near(MeanMetric):
            def update(self, logits: Tensor, targets: Tensor) -> None:
                answers, truth = of_known(logits, targets)
                near = (answers < NEAR * truth) & (answers * NEAR > truth)
                super().update(near.float(), torch.ones_like(truth))

        return collect(
            {
                "r2": Standardised(sync_on_compute=False),
                "rmse": in_units(MeanSquaredError, squared=False),
                "mae": in_units(MeanAbsoluteError),
                "abs_rel": in_units(MeanAbsolutePercentageError),
                "delta_1": Near(sync_on_compute=False),
            }
        )

    def judge(self, labels: Sequence[str], temperature: float = 1.0) -> JudgeOfDepths:
        """See `JudgeOfDepths`."""
        return JudgeOfDepths(self, labels, temperature)

    def values(self, logits: Tensor, temperature: float = 1.0) -> Tensor:
        """Numbers in their units; a temperature means nothing here."""
        return logits.float() * self.deviation + self.mean

    def as_logits(self, drawn: Tensor) -> Tensor:
        """Standardised."""
        return (drawn - self.mean) / self.deviation

    def answer(self, values: Tensor, logits: Tensor, labels: Sequence[str]) -> DepthAnswer:
        """A map of numbers, as large as the grid until it lies on an image (`on_image`)."""
        return DepthAnswer(values, self.error)

    def thin(self, logits: Tensor, targets: Tensor) -> tuple[Problem, Tensor, Tensor] | None:
        """Places with a known pixel in their middle, at some of each image, as numbers of a `regression`."""
        middle = take_middles(logits, targets)
        known = self.known(middle)
        if not bool(known.any()):
            return None
        answers, truth = logits[known], middle[known].unsqueeze(-1)
        plain, count = Regression([self.mean], [self.deviation]), len(logits)
        return plain, thin_out(answers, count), thin_out(truth, count)

    def columns(self, targets: Tensor, outputs: int) -> Tensor:
        """Standardised, `n H W 1`; NaN where it is unknown."""
        known = self.known(targets)
        return torch.where(known, self.standardise(targets.double()), torch.nan).unsqueeze(-1)

    def from_columns(self, columns: Tensor) -> Tensor:
        """In their units; NaN stays."""
        return (columns[..., 0] * self.deviation + self.mean).float()

    def surprise(self, outputs: int) -> float:
        """The variance of what is standardised."""
        return 1.0

    def gradient(self, logits: Tensor, columns: Tensor) -> Tensor:
        """Of the mean of squares over known pixels, of logits on the grid of the columns."""
        known = columns.isfinite()
        pixels = known.sum((1, 2), keepdim=True).clamp(min=1)
        return torch.where(known, 2 * (logits - columns), 0.0) / pixels

    def with_errors(self, logits: Tensor, targets: Tensor) -> Depth:
        """The same with the root of the mean squared error of these answers."""
        total, count = 0.0, 0
        # One by one: at the size of the targets all of them may not fit into memory.
        for one, wanted in zip(logits.cpu().split(1), targets.cpu().split(1), strict=True):
            known = self.known(wanted)
            off = self.values(enlarge(one.float(), wanted)[:, 0]).double() - wanted.double()
            total += float(off[known].square().sum())
            count += int(known.sum())
        if not count:
            return self
        return Depth(self.mean, self.deviation, math.sqrt(total / count), self.window)

    def with_errors_of(self, other: Problem) -> Depth:
        """The same with the error bar of another one of its kind."""
        error = other.error if isinstance(other, Depth) else None
        return Depth(self.mean, self.deviation, error, self.window)

    def without_errors(self) -> Depth:
        """The same without an error bar."""
        return self if self.error is None else Depth(self.mean, self.deviation, None, self.window)

    def describe(self, labels: Sequence[str]) -> str:
        """What is asked: "a number a pixel"."""
        return "a number a pixel"
