"""Checks that several problems make of their targets."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from restuning._errors import TrainingError
from restuning.problems.problem import Shown


def check_floats(
    targets: Any, outputs: int | None, shown: Shown | None, wanted: str, one: str
) -> None:
    """Refuse targets that are not finite numbers in floating point, `b c`.

    Args:
        targets: Of a batch or a split.
        outputs: c, where it is known.
        shown: Names the target at a place.
        wanted: What they should be, in words.
        one: What one column is.

    Raises:
        TrainingError: They are something else.
    """
    if (
        not isinstance(targets, Tensor)
        or targets.ndim != 2
        or not targets.is_floating_point()
        or (outputs is not None and targets.shape[1] != outputs)
    ):
        raise TrainingError(
            f"targets must be {wanted}, in floating point",
            found=tell_form(targets),
            fix=f"let the data set yield (input, tensor of {outputs or 'as many'} numbers), a number "
            f"for {one}",
        )
    refuse_first(
        ~targets.isfinite(),
        targets,
        shown,
        "a target is no number",
        "give the number, or take the example out",
    )


def refuse_first(
    wrong: Tensor, targets: Tensor, shown: Shown | None, what: str, fix: str, more: str = ""
) -> None:
    """Refuse targets by the first that is wrong, if one is.

    Args:
        wrong: Which of them are, `b c`, or of pixels `b H W`.
        targets: Of a batch or a split, likewise.
        shown: Names the target at a place; None for its row in the batch.
        what: What is wrong, in words.
        fix: What to do.
        more: What is told beside the value that was found.

    Raises:
        TrainingError: One is wrong.
    """
    if not bool(wrong.any()):
        return
    row, *place = wrong.nonzero()[0].tolist()
    value = targets[(row, *place)].item()
    told = f"{value:g}" if isinstance(value, float) else str(value)
    at = f"in column {place[0]}" if len(place) == 1 else "at row {}, column {}".format(*place)
    raise TrainingError(
        what,
        where=f"row {row} of the batch" if shown is None else shown(row),
        found=f"{told} {at}{more}",
        fix=fix,
    )


def refuse_smoothing(smoothing: float, kind: str) -> None:
    """Refuse to smooth the labels of a problem whose targets are numbers.

    Raises:
        TrainingError: They shall be smoothed.
    """
    if smoothing:
        raise TrainingError(
            "numbers are not smoothed",
            where=f"label_smoothing={smoothing:g}",
            found=f"problem {kind}",
            fix="leave label_smoothing at 0",
        )


def tell_form(targets: Any) -> str:
    """What targets are, for an error: type and shape."""
    if isinstance(targets, Tensor):
        return f"{targets.dtype}, shape {tuple(targets.shape)}"
    return str(type(targets))
