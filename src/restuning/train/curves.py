"""`curves.png`: loss and accuracy of every epoch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from restuning._errors import TrainingError

TRAIN, VALIDATION = "#0072b2", "#d55e00"
"""Two colours that stay apart for colour-blind readers; line styles differ as well."""


def draw_curves(history: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw a run's history.

    Args:
        history: One entry an epoch, as `FitResult.history`.
        path: Where the picture goes.

    Raises:
        TrainingError: It cannot be written.
    """
    # Figure and canvas by hand: pyplot would keep state and choose a backend for the caller.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    epochs = [entry["epoch"] for entry in history]
    for axes, key, name, scale in (
        (left, "loss", "cross entropy", 1.0),
        (right, "accuracy", "accuracy (%)", 100.0),
    ):
        for own, label, colour, style in (
            (key, "train", TRAIN, "--"), (f"val_{key}", "validation", VALIDATION, "-"),
        ):  # fmt: skip
            points = [(e, h[own] * scale) for e, h in zip(epochs, history, strict=True)
                      if h.get(own) is not None]  # fmt: skip
            if points:
                x, y = zip(*points, strict=True)
                axes.plot(x, y, style, color=colour, label=f"{label} (last: {y[-1]:.4g})",
                          linewidth=2, marker="o", markersize=4 if len(x) < 40 else 0)  # fmt: skip
        axes.set_xlabel("epoch", fontsize=12)
        axes.set_ylabel(name, fontsize=12)
        axes.tick_params(labelsize=11)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=11)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            canvas.print_png(file)
        os.replace(partial, path)
    except OSError as error:
        raise TrainingError(
            "the curves cannot be drawn", where=str(path), found=error.strerror or str(error),
            fix="free space or make the folder writable, and run the same command again",
        ) from None  # fmt: skip
    return path
