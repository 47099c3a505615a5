"""The axis of accuracies in a picture: dots on the part where they differ, never beyond 0 and 100 %."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

FEWEST_POINTS = 5.0
"""Percentage points that an axis shows at least: smaller differences must not look large."""
MARGIN = 0.25
"""Room on both sides of the values, as a share of their range."""


def choose_range(percents: Sequence[float]) -> tuple[float, float]:
    """Ends of an axis on which accuracies can be told apart, whole percents from 0 to 100.

    Args:
        percents: Accuracies in %, at least one.
    """
    low, high = min(percents), max(percents)
    room = max(MARGIN * (high - low), (FEWEST_POINTS - (high - low)) / 2)
    ends = max(0.0, low - room), min(100.0, high + room)
    # What does not fit above 100 is shown below, so that the width stays.
    low = min(ends[0], max(0.0, ends[1] - FEWEST_POINTS))
    high = max(ends[1], min(100.0, ends[0] + FEWEST_POINTS))
    return float(int(low)), float(-int(-high // 1))


def scale_accuracy(axis: Any, percents: Sequence[float], which: str) -> str:
    """Set the range of one axis of a matplotlib picture for dots; returns it in words.

    Args:
        axis: The axes that are drawn on.
        percents: Accuracies in % that are drawn; with none of them it is 0 to 100.
        which: "x" or "y".
    """
    low, high = choose_range(percents) if percents else (0.0, 100.0)
    # A dot at the end of the axis is drawn whole: beyond it there is room, but no tick.
    room = 0.06 * (high - low)
    getattr(axis, f"set_{which}lim")(low - room, high + room)
    spine = axis.spines["left" if which == "y" else "bottom"]
    spine.set_bounds(low, high)
    chosen = getattr(axis, f"{which}axis")
    chosen.set_ticks([tick for tick in chosen.get_majorticklocs() if low <= tick <= high])
    return f"from {low:g} to {high:g}"
