"""The bar a person watches while a run goes on."""

from __future__ import annotations

from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bar:
    """A rich bar on stderr, or nothing at all.

    Args:
        total: Steps.
        epochs: Passes.
        show: True shows it on a terminal only, "force" always, False never.
    """

    def __init__(self, total: int, epochs: int, show: bool | Literal["force"]) -> None:
        self.epochs = epochs
        self._bar: Progress | None = None
        self._says = {"epoch": "", "loss": "", "accuracy": ""}
        console = Console(stderr=True, force_terminal=True if show == "force" else None)
        if show and console.is_terminal:
            bar = Progress(
                TextColumn("epoch {task.fields[epoch]}"),
                BarColumn(),
                TextColumn("loss {task.fields[loss]}  {task.fields[accuracy]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
            )
            self._bar, self._row = bar, bar.add_task("", total=total, **self._says)  # type: ignore[arg-type]

    def start(self) -> None:
        """Appear."""
        if self._bar is not None:
            self._bar.start()

    def stop(self) -> None:
        """Leave the last state standing and give the terminal back."""
        if self._bar is not None:
            self._bar.stop()

    def at(
        self, step: int, epoch: int, loss: float | None, accuracy: float | None = None,
        validation: bool = False,
    ) -> None:  # fmt: skip
        """Show where the run is."""
        if self._bar is None:
            return
        self._says["epoch"] = f"{epoch}/{self.epochs}"
        if loss is not None:
            self._says["loss"] = f"{loss:.4f}"
        if accuracy is not None:
            name = "validation" if validation else "train"
            self._says["accuracy"] = f"{name} accuracy {100 * accuracy:.2f}%"
        self._bar.update(self._row, completed=step, **self._says)  # type: ignore[arg-type]
