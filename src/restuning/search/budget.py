"""The memory and time that a choice and its final run may take."""

from __future__ import annotations

import math
from dataclasses import dataclass

from restuning._durations import tell_time
from restuning._errors import TrainingError
from restuning.forecast import parse_bytes
from restuning.task import Task


@dataclass(frozen=True)
class Budget:
    """Limits; None is no limit.

    Without a limit of time nothing depends on a clock: the choice follows from data and seed alone.

    Attributes:
        memory: Bytes for everything: weights, moments, a batch and the peak above them.
        seconds: On the wall, for features, trials and the final run.
    """

    memory: int | None = None
    seconds: float | None = None

    @classmethod
    def of(cls, memory: str | None, minutes: float | None) -> Budget:
        """Read a budget as a user writes it: `2GiB`, 10.

        Raises:
            ForecastError: Not an amount of memory.
            TrainingError: Not a time.
        """
        if minutes is not None and not (math.isfinite(minutes) and minutes > 0):
            raise TrainingError(
                "not a budget of time",
                where="minutes",
                found=str(minutes),
                fix="give minutes above 0, or none for no limit",
            )
        return cls(
            None if memory is None else parse_bytes(str(memory)),
            None if minutes is None else 60 * minutes,
        )

    def share(self, count: int) -> Budget:
        """That of one of so many choices, which follow one another: memory is free again, time is not."""
        return Budget(self.memory, None if self.seconds is None else self.seconds / count)

    def refuses_memory(self, needed: int | None) -> str:
        """Why so much memory is refused, in words; empty where it fits or nothing is known."""
        # What no forecast can follow is not refused: a guess would leave out what may well fit.
        if self.memory is None or needed is None or needed <= self.memory:
            return ""
        return f"needs {format_bytes(needed)} of memory, budget {format_bytes(self.memory)}"

    def refuses_time(self, needed: float) -> str:
        """Why so much time, from the first candidate to the end, is refused; empty where it fits."""
        if self.seconds is None or needed <= self.seconds:
            return ""
        # Words, because they become the `why` of a candidate that is left out.
        return f"needs {tell_time(needed)}, budget {tell_time(self.seconds)}"


def keep_taps_if_memory_is_free(task: Task, budget: Budget) -> None:
    """Without a limit of memory nothing is computed twice to save it: the same gradients, sooner."""
    if budget.memory is None and task.side is not None:
        task.side.recompute = False


def format_bytes(size: int) -> str:
    """`3.1 GiB`, `512 MiB`."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{max(1, round(size / 2**20))} MiB"
