"""The plots of a report, as SVG texts that are the same for the same results."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from restuning.bench.report.statistics import Interval, critical_difference, mean_ranks
from restuning.bench.report.summary import Summary

PALETTE = (
    "#2a6fbb",
    "#d9822b",
    "#3a9a5b",
    "#b8405e",
    "#7b5ea7",
    "#8a6d3b",
    "#3aa6a6",
    "#c24d9b",
    "#6b7280",
    "#a3b545",
    "#e0b400",
    "#1f4e5f",
)

NARROW = 3
"""Costs within this ratio are shown on a linear axis: a logarithmic one would have no tick between."""
WIDE_RATIO = 200
"""Costs from this ratio on have powers of ten alone as ticks: 1, 2 and 5 would lie on each other."""
LIFT, WIDE, HIGH = 5, 130, 13
"""Pixels: a name above its point, and how far the names of two points are kept apart."""


def pick_colours(labels: Sequence[str]) -> dict[str, str]:
    """Give every method a colour, the same in every plot."""
    return {label: PALETTE[n % len(PALETTE)] for n, label in enumerate(labels)}


def spread_labels(points: Sequence[tuple[float, float]]) -> list[float]:
    """Heights of the names of points, in pixels, so that no two names lie on each other."""
    taken: dict[int, tuple[float, float]] = {}
    # From the highest down, so that a name only ever has to move down.
    for number in sorted(range(len(points)), key=lambda n: -points[n][1]):
        across, height = points[number][0], points[number][1] + LIFT
        while any(abs(across - a) < WIDE and abs(height - b) < HIGH for a, b in taken.values()):
            height -= 1
        taken[number] = across, height
    return [taken[n][1] for n in range(len(points))]


def draw_scatter(
    summary: Summary,
    labels: Sequence[str],
    tasks: Sequence[str],
    of: Callable[[dict[str, Any]], Any],
    axis: str,
    scale: float = 1.0,
) -> str | None:
    """Mean accuracy against a cost, logarithmic where it is wide; None where no run tells the cost."""
    points = []
    for label in labels:
        cost = summary.cost(label, tasks, of)
        if cost is not None:
            mean, spread = summary.mean(label, tasks)
            points.append((label, cost / scale, 100 * mean, 100 * (spread or 0)))
    if not points:
        return None
    plt = _import_pyplot()
    figure, axes = plt.subplots(figsize=(5.6, 3.8), layout="constrained")
    colour = pick_colours(labels)
    # Those that a logarithmic axis can show.
    positive = [x for _, x, _, _ in points if x > 0]
    # Zero (no parameter but the head) has no logarithm: it stands left of all others.
    left = min(positive, default=1.0) / (4 if len(positive) < len(points) else 1)
    for label, x, y, spread in points:
        at = x if x > 0 else left
        axes.errorbar(at, y, yerr=spread or None, fmt="o", ms=7, color=colour[label], capsize=3)
    right = max(x for _, x, _, _ in points)
    if right > NARROW * left:
        _use_logarithms(axes.xaxis, right / left)
    axes.margins(x=0.25, y=0.12)
    axes.set_xlabel(axis)
    axes.set_ylabel(f"accuracy in %, {_name_tasks(tasks)}")
    # Before this nothing has a place in pixels yet.
    figure.draw_without_rendering()
    # Names are kept apart where they are drawn, in pixels, whatever the axes.
    pixels = [axes.transData.transform((x if x > 0 else left, y)) for _, x, y, _ in points]
    for (label, x, y, _), (_, up), height in zip(
        points, pixels, spread_labels(pixels), strict=True
    ):
        axes.annotate(
            label if x > 0 else f"{label} (0)",
            (x if x > 0 else left, y),
            xytext=(9, height - up),
            textcoords="offset pixels",
            fontsize=8,
            color=colour[label],
        )
    return _write_svg(figure, axes)


def _use_logarithms(axis: Any, ratio: float) -> None:
    """A logarithmic axis whose ticks are plain numbers: matplotlib's own are formulas, which are not read here."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.axes.set_xscale("log")
    # A narrow one has a power of ten or none between its ends.
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if ratio < WIDE_RATIO else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if x >= 1 else f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def draw_group_bars(summary: Summary, labels: Sequence[str], tasks: Sequence[str]) -> str:
    """Draw mean accuracy by group of tasks, as bars."""
    plt = _import_pyplot()
    means = {label: summary.group_means(label, tasks) for label in labels}
    groups = list(next(iter(means.values())))
    height = 0.8 / len(labels)
    figure, axes = plt.subplots(
        figsize=(5.6, 1.0 + 0.24 * len(labels) * len(groups)), layout="constrained"
    )
    colour = pick_colours(labels)
    for place, label in enumerate(labels):
        at = [n + place * height for n in range(len(groups))]
        values = [100 * means[label][g] for g in groups]
        axes.barh(at, values, height * 0.9, color=colour[label], label=label)
        for y, value in zip(at, values, strict=True):
            axes.annotate(
                f"{label} {value:.1f}",
                (value, y),
                xytext=(-4, 0),
                fontsize=7,
                textcoords="offset points",
                va="center",
                ha="right",
                color="white",
            )
    axes.set_yticks(
        [n + 0.4 - height / 2 for n in range(len(groups))], [g or "tasks" for g in groups]
    )
    axes.invert_yaxis()
    axes.set_xlabel("mean accuracy in %")
    return _write_svg(figure, axes, grid="x")


def draw_intervals(found: dict[str, Interval], reference: str, labels: Sequence[str]) -> str:
    """Draw differences to a reference method with their bootstrap intervals."""
    plt = _import_pyplot()
    rows = sorted(found.items(), key=lambda item: item[1].mean)
    figure, axes = plt.subplots(figsize=(5.6, 1.1 + 0.3 * len(rows)), layout="constrained")
    colour = pick_colours(labels)
    for place, (label, each) in enumerate(rows):
        below, above = 100 * (each.mean - each.low), 100 * (each.high - each.mean)
        # A resample's percentiles may leave its mean outside by a rounding.
        error = [[max(0.0, below)], [max(0.0, above)]]
        axes.errorbar(
            100 * each.mean,
            place,
            xerr=error,
            fmt="o",
            color=colour[label],
            capsize=3,
            alpha=1.0 if each.sure else 0.45,
        )
    axes.axvline(0, color="#444", lw=1)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.set_xlabel(f"points of accuracy above {reference}, 95 % paired bootstrap")
    return _write_svg(figure, axes, grid="x")


def draw_ranks(summary: Summary, labels: Sequence[str], tasks: Sequence[str]) -> str | None:
    """Mean ranks with Nemenyi's critical difference; None for too few methods or tasks."""
    if len(labels) < 2 or len(tasks) < 2:
        return None
    plt = _import_pyplot()
    mean = sorted(mean_ranks(summary, labels, tasks).items(), key=lambda item: item[1])
    limit = critical_difference(len(labels), len(tasks))
    figure, axes = plt.subplots(figsize=(5.6, 1.3 + 0.3 * len(mean)), layout="constrained")
    colour = pick_colours(labels)
    for place, (label, rank) in enumerate(mean):
        axes.plot(
            [rank, rank + limit],
            [place, place],
            color=colour[label],
            alpha=0.35,
            lw=6,
            solid_capstyle="butt",
        )
        axes.plot(rank, place, "o", color=colour[label])
    axes.set_yticks(range(len(mean)), [label for label, _ in mean])
    axes.invert_yaxis()
    axes.set_xlabel(
        f"mean rank over {len(tasks)} tasks; bars are the critical difference {limit:.2f}"
    )
    return _write_svg(figure, axes, grid="x")


def _name_tasks(tasks: Sequence[str]) -> str:
    return tasks[0] if len(tasks) == 1 else f"mean of {len(tasks)} tasks"


def _import_pyplot() -> Any:
    import matplotlib as mpl

    # No display is needed, nor touched where there is one.
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    # Words stay words that can be found and copied; names of parts do not change from run to run.
    plt.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "restuning",
            # Labels are the user's: a dollar is none of a formula.
            "text.parse_math": False,
            "font.size": 9,
            "font.family": "sans-serif",
        }
    )
    return plt


def _write_svg(figure: Any, axes: Any, grid: str = "both") -> str:
    axes.grid(axis=grid, alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    stream = io.StringIO()
    # Without date and creator: the same results give the same bytes.
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    _import_pyplot().close(figure)
    text = stream.getvalue()
    # The XML declaration may not stand inside an HTML page.
    return re.sub(r"^.*?(?=<svg)", "", text, flags=re.DOTALL)
