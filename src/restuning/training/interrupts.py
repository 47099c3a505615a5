"""Ctrl-C and SIGTERM wait for the end of a step, so that what is saved is whole."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Inside the block a first signal is only noted; a second one acts as it always did.

    Attributes:
        signal: The one that was noted, or None.
        stopped: Whether `stop` raised it: between two steps, where everything is whole.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
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
        number = self.signal if number is None else number
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
        # From here on a second signal acts as it always did, so that a run that hangs can be ended.
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            # None: that handler was not installed from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}
