"""How a choice follows from trials: plain functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

DOUBT = 2.0
"""Standard errors of validation that a trial is given before it counts as lost."""


def standard_error(accuracy: float, count: int) -> float:
    """Standard error of an accuracy on `count` examples: `sqrt(p (1 - p) / (n + 2))` with `p = (hits + 1) / (n + 2)`.

    The two examples more keep it above zero where all answers are right, or none (Agresti and
    Coull 1998).
    """
    p = (accuracy * count + 1) / (count + 2)
    return math.sqrt(p * (1 - p) / (count + 2))


def score_of(row: Mapping[str, Any]) -> float | None:
    """What a row has on validation: accuracy, or the `metric` that it names; None where it was not trained."""
    return row.get(f"val_{row.get('metric', 'accuracy')}")


def find_highest(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The row with the highest score (`val_accuracy`), of equals the first, which is the cheapest; or None.

    Not the cheapest within one standard error, as trees are pruned (Breiman et al. 1984). With noise s
    in the difference of two methods, taking the better looking one loses at most 0.17 s on average,
    whatever their true difference; preferring the cheaper within one standard error loses up to
    0.51 s. With 200 examples s is about 2.5 points, which is 0.4 and 1.3 points. What a cheaper method
    saves is for the budget to say.
    """
    tried = [(score, row) for row in rows if (score := score_of(row)) is not None]
    return max(tried, key=lambda each: each[0])[1] if tried else None


def choose(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The row to take: of those not told apart from the highest, the one whose probabilities fit best.

    An accuracy on 200 examples is known to about 3 points, a difference of two to 2 or more, while
    methods are 1 to 4 apart. Their cross-entropies, each after a temperature of its own, say more of the same
    examples: on `cifar100` the highest two were 1 point apart one way, which is noise, and 1.97 to 1.92
    the other way by cross-entropy, as on the test split (`recipes/shared_tasks`). With more
    examples fewer methods are within one standard error, and accuracy alone decides. A trial that was
    ended early is not taken for it.
    """
    top = find_highest(rows)
    if top is None:
        return None
    rivals = [
        row
        for row in rows
        if row["status"] == "tried"
        and "cross_entropy" in row
        and _ahead(top, row) <= difference_error(row, top)
    ]
    # Where the highest was ended early and none is near it, it is taken all the same.
    return min(rivals, key=lambda row: row["cross_entropy"], default=top)


def _ahead(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    return (score_of(one) or 0.0) - (score_of(other) or 0.0)


def difference_error(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Standard error of the difference of two rows, as if their errors were independent."""
    return math.hypot(one["standard_error"], other["standard_error"])


def is_lost(accuracy: Sequence[float], epochs: int, to_beat: float, count: int) -> bool:
    """Whether a trial will end below `to_beat` even if every epoch left gains as much as the last.

    Curves of accuracy bend down, except at their start, where they may lie flat for a while. So
    nothing is judged before half of the trial, and a doubt of two standard errors of the difference is
    allowed.

    Args:
        accuracy: On validation, after each epoch so far.
        epochs: Epochs of the whole trial.
        to_beat: The best of the other trials, 0 for none.
        count: Validation examples.
    """
    if len(accuracy) < max(2, epochs / 2):
        return False
    # A last epoch that went down is noise: none of those left is taken to go down.
    gain = max(0.0, accuracy[-1] - accuracy[-2])
    end = min(1.0, accuracy[-1] + gain * (epochs - len(accuracy)))
    # Both are measured on the same examples; as if independent, the doubt is rather too large.
    doubt = math.hypot(standard_error(end, count), standard_error(to_beat, count))
    return end + DOUBT * doubt < to_beat


def explain(row: Mapping[str, Any], chosen: Mapping[str, Any]) -> str:
    """Why a row that was tried is taken or not."""
    ahead = _ahead(row, chosen)
    if row is chosen:
        return "taken"
    if ahead == 0:
        return "equal"
    words = f"{100 * abs(ahead):.1f} points {'ahead' if ahead > 0 else 'behind'}"
    if abs(ahead) > difference_error(row, chosen):
        return words
    # One that is ahead was passed over for its cross-entropy.
    return f"{words}, within one standard error" + (", fits worse" if ahead > 0 else "")
