"""Reports of a run while it goes: `log.jsonl`, a bar or plain lines, and its curves."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from restuning._errors import TrainingError
from restuning._files import replacing
from restuning.problems import Problem, SingleLabel
from restuning.runtime.shown import draws_bars


class LogFile:
    """The log of a run. A resumed run cuts it back to its checkpoint, so no line stands twice.

    Args:
        path: The file.
        position: Bytes to keep of what is there.

    Raises:
        TrainingError: It cannot be written.
    """

    def __init__(self, path: Path, position: int = 0) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = path.open("ab")
            size = path.stat().st_size
            # Later lines are of steps that are made again; beyond its end a file would grow by
            # zeros.
            self._file.truncate(min(position, size))
            self._file.seek(0, os.SEEK_END)
        except OSError as error:
            raise self._write_error(error) from None

    def write(self, line: Mapping[str, Any]) -> None:
        """Add a line; it reaches the file at once, so that a reader can follow."""
        try:
            self._file.write((json.dumps(line) + "\n").encode())
            self._file.flush()
        except OSError as error:
            raise self._write_error(error) from None

    def position(self) -> int:
        """Bytes so far, all of them on the disk."""
        try:
            self._file.flush()
            # The checkpoint names this position: after a power cut the bytes must be there, too.
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._write_error(error) from None
        return self._file.tell()

    def close(self) -> None:
        """Close the file; what a full disk refuses now, a resumed run writes again."""
        try:
            self._file.close()
        except OSError:
            return

    def _write_error(self, error: OSError) -> TrainingError:
        return TrainingError(
            "the log cannot be written",
            where=str(self.path),
            found=error.strerror or str(error),
            fix="free space or make the folder writable, and run the same command again: it goes "
            "on from the last checkpoint",
        )


class Progress:
    """Where a run is, on stderr: a bar on a terminal and in a notebook with ipywidgets, a plain line now and then elsewhere.

    Args:
        total: Steps.
        every: Steps between two plain lines.
        show: False says nothing, "force" shows the bar without a terminal as well.
    """

    def __init__(self, total: int, every: int, show: bool | Literal["force"]) -> None:
        self.total, self.every = total, every
        self._bar: RichProgress | None = None
        self._plain = False
        self._step = 0
        if not show:
            return
        console = Console(stderr=True, force_terminal=True if show == "force" else None)
        if draws_bars(console):
            self._bar = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
            )
            self._row = self._bar.add_task("", total=total)
        else:
            self._plain = True

    def start(self, step: int) -> None:
        """Appear, with so many steps done."""
        self._step = step
        if self._bar is not None:
            self._bar.start()

    def stop(self) -> None:
        """Leave the last state standing and give the terminal back."""
        if self._bar is not None:
            if self._bar.console.is_jupyter:
                # Which rich leaves there as it was at its last refresh by the clock.
                self._bar.refresh()
            self._bar.stop()

    def update(self, step: int, words: str) -> None:
        """Show where the run is."""
        if self._bar is not None:
            self._bar.update(self._row, completed=step, description=words)
        # A multiple of `every` was passed; the calls themselves need not fall on one.
        elif self._plain and (step // self.every > self._step // self.every or step == self.total):
            # Not by rich, which would break the line where it guesses that a terminal ends.
            sys.stderr.write(f"{words}\n")
            sys.stderr.flush()
        self._step = step


TRAIN, VALIDATION = "#0072b2", "#d55e00"
"""Two colours that stay apart for colour-blind readers; line styles differ as well."""


def draw_curves(
    history: Sequence[Mapping[str, Any]], path: Path, problem: Problem | None = None
) -> Path:
    """Draw a run's history.

    Args:
        history: One entry an epoch, as `FitResult.history`.
        path: Where the picture goes.
        problem: Whose loss and metric are shown; None for one class of several.

    Raises:
        TrainingError: It cannot be written.
    """
    # Figure and canvas by hand: pyplot would keep state and choose a backend for the caller.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 4))
    canvas = FigureCanvasAgg(figure)
    # Margins by hand: `layout="constrained"` draws everything twice, half of a short run's time.
    left, right = figure.subplots(
        1, 2, gridspec_kw={"left": 0.08, "right": 0.99, "bottom": 0.15, "top": 0.97, "wspace": 0.22}
    )
    problem = SingleLabel() if problem is None else problem
    shown = problem.metric.replace("_", " ")
    epochs = [entry["epoch"] for entry in history]
    for axes, key, name, scale in (
        (left, "loss", problem.loss_name, 1.0),
        (right, problem.metric, f"{shown} (%)", 100.0)
        if problem.percent
        else (right, problem.metric, shown, 1.0),
    ):
        for own, label, colour, style in (
            (key, "train", TRAIN, "--"),
            (f"val_{key}", "validation", VALIDATION, "-"),
        ):
            points = [
                (e, h[own] * scale)
                for e, h in zip(epochs, history, strict=True)
                if h.get(own) is not None
            ]
            if points:
                x, y = zip(*points, strict=True)
                axes.plot(
                    x,
                    y,
                    style,
                    color=colour,
                    label=f"{label} (last: {y[-1]:.4g})",
                    linewidth=2,
                    marker="o",
                    markersize=4 if len(x) < 40 else 0,
                )
        axes.set_xlabel("epoch", fontsize=12)
        axes.set_ylabel(name, fontsize=12)
        axes.tick_params(labelsize=11)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=11)
    try:
        # Closed before it takes its name.
        with replacing(path) as partial, partial.open("wb") as file:
            canvas.print_png(file)
    except OSError as error:
        raise TrainingError(
            "the curves cannot be drawn",
            where=str(path),
            found=error.strerror or str(error),
            fix="free space or make the folder writable, and run the same command again",
        ) from None
    return path
