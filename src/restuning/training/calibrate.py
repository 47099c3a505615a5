"""Probabilities that mean what they say: the temperature of a task, and how far its answers are from it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from restuning._errors import FormatError
from restuning._files import fits
from restuning.problems import Problem, find_problem, to_probabilities
from restuning.problems.reliability import calibration_error
from restuning.task.task import OCTAVES, check_temperature
from restuning.training.evaluate import collect_logits

STEPS = 32
"""Temperatures from one to its double: neighbours are 2 % apart, which no validation split tells apart,
and the one that is found does not hang on how a machine rounds."""

VALIDATION = "validation"
LEFT_OUT_ROWS = "rows left out of training"


@dataclass(frozen=True)
class Calibration:
    """The temperature of a task, and what it did.

    Attributes:
        temperature: Of the task.
        on: The held-out answers that it was fitted to; None where there were none, and it is 1.
        ece: Expected calibration error on the validation split with it, None without a split. One
            number was fitted there, so on new data it is a little higher.
        ece_uncalibrated: The same of the logits as they are.
    """

    temperature: float = 1.0
    on: str | None = None
    ece: float | None = None
    ece_uncalibrated: float | None = None

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> Calibration:
        """What `to_dict` wrote among other entries; where an earlier version wrote none, nothing was fitted.

        Raises:
            FormatError: One is not what it should be.
        """
        on = entries.get("calibrated_on")
        errors = entries.get("val_ece"), entries.get("val_ece_uncalibrated")
        shares = all(each is None or (fits(each, float) and 0 <= each <= 1) for each in errors)
        if not shares or not fits(on, str | None):
            raise FormatError(
                "what a result says of its calibration is malformed",
                found=f"calibrated on {on!r}, errors {errors}"[:200],
                fix="delete the result and run the same command again",
            )
        return cls(check_temperature(entries.get("temperature", 1.0)), on, *errors)

    def of_another_run(self) -> Calibration:
        """The same for a run on all data, whose settings were those of this one."""
        return replace(self, on=f"{self.on} of the trial") if self.on == VALIDATION else self

    def describe(self) -> str:
        """In words, for a log."""
        words = f"temperature {self.temperature:.3g} from {self.on}"
        if self.ece is None or self.ece_uncalibrated is None:
            return words
        return f"{words}: calibration error {self.ece_uncalibrated:.1%}, with it {self.ece:.1%}"

    def to_dict(self) -> dict[str, Any]:
        """The entries of `metrics.json`."""
        return {
            "temperature": self.temperature,
            "calibrated_on": self.on,
            "val_ece": self.ece,
            "val_ece_uncalibrated": self.ece_uncalibrated,
        }


def has_calibration(entries: Mapping[str, Any]) -> bool:
    """Whether `Calibration.from_dict` reads one from a result."""
    try:
        Calibration.from_dict(entries)
    except FormatError:
        return False
    return True


def calibrate(
    tuned: nn.Module, val: Any, batch_size: int = 64, collate: Callable | None = None
) -> Calibration:
    """Give a trained task the temperature that fits data which it was not trained on.

    `restuning.train` does so at its end; after a `fit` of one's own it is one call.

    Of a task that answers with numbers the error bars are set, from the same data (`Problem.with_errors`).

    Args:
        tuned: With `.task`, whose `temperature` is set.
        val: Map-style, yields `(input, label)`; not seen in training.
        batch_size: Inputs of one forward.
        collate: Makes a batch of a list of examples.

    Raises:
        TrainingError: Targets are none of the task's problem.

    Cost: one forward of the split; its logits are held in memory.
    """
    task: Any = tuned.task
    logits, targets = collect_logits(tuned, val, batch_size, collate)
    found = judge(task, logits, targets)
    task.temperature = found.temperature
    if (told := find_problem(task).with_errors(logits, targets)) != find_problem(task):
        task.problem = told
    return found


def judge(task: nn.Module, logits: Tensor, labels: Tensor) -> Calibration:
    """The temperature that a task's held-out answers ask for, and the errors with it and without.

    A side network that scales its answers itself (`SideNetwork.calibrated`) keeps them as they are.

    Args:
        task: Whose answers they are.
        logits: `n c`.
        labels: Targets of the task's problem, one each. Where answers are no choices there is no temperature.
    """
    choices = find_problem(task).choices(logits, labels)
    if choices is None:
        return Calibration()
    logits, labels = choices
    temperature, on = fit_temperature(logits, labels), VALIDATION
    if scales_itself(task):
        temperature, on = 1.0, LEFT_OUT_ROWS
    right = logits.argmax(1) == labels
    before, after = (
        calibration_error(to_probabilities(logits, each).amax(1), right)
        for each in (1.0, temperature)
    )
    # Logits that are no numbers have no error, which would be none in JSON either.
    finite = bool(logits.isfinite().all())
    return Calibration(temperature, on, *((after, before) if finite else (None, None)))


def scales_itself(task: nn.Module) -> bool:
    """Whether its side network makes calibrated answers by itself."""
    return bool(getattr(getattr(task, "side", None), "calibrated", False))


def fit_temperature(logits: Tensor, labels: Tensor, *, doubt: float = 0.5) -> float:
    r"""`argmin_T mean_i -(1 - e) log p_i[y_i] - e log p_i[r_i]` with `p_i = softmax(z_i / T)`.

    One temperature by cross-entropy (Guo et al. 2017). r is the best class beside the label and
    `e = doubt / (n + 2 doubt)`, as if `2 doubt` examples more had been answered right in half of all cases: a
    share of right answers counts as `(hits + 1/2) / (n + 1)` (Jeffreys). Without it n answers that are all right
    would be told as certain: fitted to 30 examples, temperatures gave test splits a cross-entropy of 0.83 with
    it and 1.12 without (`python recipes/calibration.py`). Twice the logits have twice the temperature.

    Args:
        logits: `n c`, of examples that were not trained on.
        labels: `n`.
        doubt: 0 believes the n examples alone.

    Returns:
        From 1/1024 to 1024, to 2 %; 1 where the logits say nothing (of one class, or all equal).
    """
    # From the first class on: what all have in common cancels, and of a single class nothing is left.
    z = logits.float() - logits[:, :1].float()
    share = doubt / (len(z) + 2 * doubt)
    others = z.scatter(1, labels[:, None], -torch.inf).argmax(1)
    parts = ((1 - share, labels), (share, others))
    wanted = sum(weight * z.gather(1, each[:, None])[:, 0] for weight, each in parts)

    def slope(step: int) -> float:
        chances = (2 ** (step / STEPS) * z).softmax(1)
        return float(((chances * z).sum(1) - wanted).mean())

    def loss(step: int) -> float:
        scaled = 2 ** (step / STEPS) * z
        return sum(weight * float(F.cross_entropy(scaled, each)) for weight, each in parts)

    # Zero where nothing hangs on the temperature, and no number where the logits are none.
    if not abs(slope(0)) > 0:
        return 1.0
    # Cross-entropy is convex in 1 / T: its slope there changes sign once, between two steps.
    steps = range(-OCTAVES * STEPS, OCTAVES * STEPS + 1)
    above = bisect_left(steps, 0.0, key=slope)
    return 2 ** (-min(steps[max(0, above - 1) : above + 1], key=loss) / STEPS)


def calibrated_loss(logits: Tensor, labels: Tensor, problem: Problem | None = None) -> float:
    r"""`min_T mean_i -log softmax(z_i / T)[y_i]`: the problem's loss after the best of all temperatures.

    Training to the end makes logits loud, which says nothing of who answers better (Guo et al. 2017). Trials
    are compared on the examples they share, so there is no `doubt`.

    Args:
        logits: `n c`.
        labels: `n`, or targets of another problem.
        problem: None for one class of several.
    """
    problem = find_problem(None) if problem is None else problem
    choices = problem.choices(logits, labels)
    if choices is None:
        return float(problem.loss(logits, labels)) / len(logits)
    logits, labels = choices
    return float(F.cross_entropy(logits / fit_temperature(logits, labels, doubt=0.0), labels))
