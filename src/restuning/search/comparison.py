"""Several methods on the same data, as figures, JSON and a picture."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from restuning._errors import TrainingError
from restuning._files import write_text
from restuning.training.run import Run

FILE = "comparison.json"
MIB = 2**20
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
        """The first of those with the highest accuracy on validation.

        Raises:
            TrainingError: There is no validation split to say so.
        """
        # Not on test: the figure of the best of several would then be too high.
        if any(run.metrics["val_accuracy"] is None for run in self.runs):
            raise TrainingError(
                "the best of a comparison is chosen on validation data",
                where=str(self.folder),
                found="none",
                fix="take one of .runs, or give data with a val split",
            )
        # `max` keeps the first of equals, and methods are named in the caller's order.
        return max(self.runs, key=lambda run: run.metrics["val_accuracy"])

    def save(self, title: str) -> None:
        """Leave `comparison.json` and `comparison.png` in the folder."""
        write_text(self.folder / FILE, json.dumps(self.rows(), indent=1) + "\n")
        self.draw(self.folder / "comparison.png", title)

    def draw(self, file: Path, title: str) -> None:
        """Draw accuracy, memory, parameters and time beside each other."""
        # Figure and canvas by hand: pyplot would keep state and choose a backend for the caller.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        rows = self.rows()
        names = [row["method"] for row in rows]
        panels = [
            ("test accuracy (%)", [100 * (row["test_accuracy"] or 0) for row in rows], "{:.2f}"),
            (
                "memory above weights (MiB)",
                [(row["peak_memory_bytes"] or 0) / MIB for row in rows],
                "{:.0f}",
            ),
            (
                "trained parameters (thousand)",
                [row["trainable_parameters"] / 1e3 for row in rows],
                "{:.1f}",
            ),
            ("training time (s)", [row["seconds"] for row in rows], "{:.1f}"),
        ]
        figure = Figure(figsize=(14, 3.6), layout="constrained")
        axes = figure.subplots(1, len(panels))
        for axis, (label, values, number) in zip(axes, panels, strict=True):
            bars = axis.bar(names, values, color=COLOURS[: len(names)], width=0.65)
            axis.bar_label(bars, [number.format(v) for v in values], padding=2, fontsize=9)
            axis.set_title(label, fontsize=10)
            axis.tick_params(axis="x", labelsize=8, rotation=12)
            axis.spines[["top", "right"]].set_visible(False)
            axis.margins(y=0.15)
        lowest = min(panels[0][1])
        # Bars that differ by a point look the same from zero; the axis says where it starts.
        axes[0].set_ylim(max(0, lowest - 3 * (100 - lowest) / 2), 100.5)
        figure.suptitle(title)
        FigureCanvasAgg(figure)
        figure.savefig(file, dpi=130)
