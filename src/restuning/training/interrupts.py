"""Ctrl-C and SIGTERM wait for the end of a step, so that what is saved is whole."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from restuning._errors import DivergedError, TrainingError
from restuning.training.settings import FitSettings

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Inside the block a first signal is only noted; a second one acts as it always did.

    Attributes:
        asked: The signal that was noted, or None.
        stopped: Whether `stop` raised it: between two steps, where everything is whole.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self.stopped = False
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> Interrupts:
        """Listen, if this is the main thread: Python allows it nowhere else."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop listening."""
        self._restore()

    def stop(self, number: int | None = None) -> None:
        """Raise what the noted signal means; nothing if there was none.

        Raises:
            KeyboardInterrupt: Ctrl-C.
            SystemExit: SIGTERM, with the exit status a shell expects.
        """
        number = self.asked if number is None else number
        self.stopped = number is not None
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if number:
            raise SystemExit(128 + number)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A worker that loads data inherits this handler: Ctrl-C is its parent's to answer.
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        self.asked = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}


def diverged(
    step: int, rate: float, found: str, settings: FitSettings, folder: Path
) -> DivergedError:
    """The loss or a weight is NaN or infinite."""
    other = ', precision="bf16" or "no"' if settings.precision == "fp16" else ""
    return DivergedError(
        "training diverged",
        where=f"step {step}, learning rate {rate:.3g}",
        found=found,
        fix=f"lower lr (it is {settings.lr:g}), set clip=1.0{other}, or look for NaN in the data; "
        "start again with --no-resume or another --out. The last good checkpoint is kept in "
        f"{folder}",
    )


def short_of_memory(error: Exception, settings: Any) -> TrainingError:
    """The device has no room for a piece of a batch."""
    return TrainingError(
        "the device is out of memory",
        found=str(error).splitlines()[0][:200],
        fix=f"run each batch in more pieces (accumulate={2 * settings.accumulate}; the steps stay "
        'the same), or use precision="bf16" or a bypass method; with --no-resume or another --out',
    )
