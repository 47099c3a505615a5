"""Several methods on the same data, as figures, JSON and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from restuning._errors import TrainingError
from restuning._files import write_text
from restuning.search.accuracy_axis import scale_accuracy
from restuning.search.as_written import write_figure
from restuning.training.run import SHORT, Run, measured_on, metric_of

FILE, PICTURE = "comparison.json", "comparison.png"
MIB = 2**20
NOT_MEASURED = "not measured"
COLOURS = ("#8c8c8c", "#2a6fbb", "#d9822b", "#3a9a5b", "#8e5ea2")


@dataclass(frozen=True)
class Comparison:
    """Several methods trained on the same data.

    Attributes:
        runs: One a method, in the order they were named.
        folder: Where the comparison lies: a folder for each run, and `comparison.json`.
    """

    runs: tuple[Run, ...]
    folder: Path

    def rows(self) -> list[dict[str, Any]]:
        """The figures that are compared, a row a method."""
        return [run.row() for run in self.runs]

    @property
    def best(self) -> Run:
        """The first of those with the highest accuracy on validation, or other figure.

        Raises:
            TrainingError: There is no validation split to say so.
        """
        # Not on test: the figure of the best of several would then be too high.
        if any(run.val_score is None for run in self.runs):
            raise TrainingError(
                "the best of a comparison is chosen on validation data",
                where=str(self.folder),
                found="none",
                fix="take one of .runs, or give data with a val split",
            )
        # `max` keeps the first of equals, and methods are named in the caller's order.
        return max(self.runs, key=lambda run: run.val_score or 0.0)

    def save(self, title: str) -> None:
        """Leave `comparison.json` and `comparison.png` in the folder."""
        write_text(self.folder / FILE, json.dumps(self.rows(), indent=1) + "\n")
        self.draw(self.folder / PICTURE, title)

    def draw(self, file: Path, title: str) -> None:
        """Draw accuracy, memory, parameters and time beside each other."""
        # A figure by hand: pyplot would keep state and choose a backend for the caller.
        from matplotlib.figure import Figure

        rows = self.rows()
        names = [row["method"] for row in rows]
        # The same for all: they were trained on the same data.
        split = measured_on(rows[0]) if rows else "test"
        metric = metric_of(rows[0]) if rows else "accuracy"
        accuracies = [_scale(row[f"{SHORT[split]}_{metric}"], 100) for row in rows]
        panels = [
            (
                "memory above weights (MiB)",
                [_scale(r["peak_memory_bytes"], 1 / MIB) for r in rows],
                0,
            ),
            (
                "trained parameters (thousand)",
                [_scale(r["trainable_parameters"], 1e-3) for r in rows],
                1,
            ),
            ("training time (s)", [_scale(r["seconds"], 1) for r in rows], 1),
        ]
        figure = Figure(figsize=(14, 3.6), layout="constrained")
        first, *others = figure.subplots(1, 1 + len(panels))
        _draw_dots(first, accuracies, f"{split} {metric.replace('_', ' ')}")
        for axis, (label, values, digits) in zip(others, panels, strict=True):
            # From zero: lengths of bars are compared.
            bars = axis.bar(range(len(rows)), [v or 0 for v in values], width=0.65)
            for bar, colour in zip(bars, COLOURS * len(rows), strict=False):
                bar.set_color(colour)
            words = [NOT_MEASURED if v is None else f"{v:,.{digits}f}" for v in values]
            axis.bar_label(bars, words, padding=2, fontsize=9)
            axis.set_title(label, fontsize=10)
            axis.margins(y=0.15)
        for axis in (first, *others):
            axis.set_xticks(range(len(rows)), names, fontsize=8, rotation=12)
            axis.spines[["top", "right"]].set_visible(False)
        figure.suptitle(title)
        write_figure(figure, file, dpi=130)


def _scale(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value


def _draw_dots(axis: Any, accuracies: Sequence[float | None], what: str) -> None:
    """Accuracies or other scores in %, as dots: methods differ by a few points, which bars from zero do not show."""
    shown = scale_accuracy(axis, [value for value in accuracies if value is not None], "y")
    axis.set_title(f"{what} (%), {shown}", fontsize=10, pad=12)
    axis.set_xlim(-0.5, len(accuracies) - 0.5)
    axis.grid(axis="y", alpha=0.3)
    for place, value in enumerate(accuracies):
        if value is None:
            axis.text(place, 0.5, NOT_MEASURED, transform=axis.get_xaxis_transform(), ha="center")
            continue
        colour = COLOURS[place % len(COLOURS)]
        axis.plot(place, value, "o", markersize=9, color=colour)
        axis.annotate(
            f"{value:.2f}",
            (place, value),
            (0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
