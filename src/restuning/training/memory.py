"""Peak memory of a run above what was there at its start, and how it was measured."""

from __future__ import annotations

import ctypes
import gc
import sys
from contextlib import suppress
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows has no such module.
    resource = None

CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")
RESET_PEAK = "5"
"""What Linux takes as "set VmHWM back to the present size" (man 5 proc)."""


class PeakMemory:
    """Measures from the moment it is made.

    Args:
        device: Where the run computes.

    Attributes:
        how: "cuda max_memory_allocated", "VmHWM" (Linux, reset at the start; without the pages of files that came in
            meanwhile, which are code of libraries, told else of whichever run is the first, and stores that the system
            drops when it needs room), "ru_maxrss" (cannot be reset: says 0 if the process was larger before), or
            "unavailable".
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._start = 0
        _return_freed_memory()
        if self.device.type == "cuda":
            self.how = "cuda max_memory_allocated"
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
        elif _reset_peak() and (now := _status("VmRSS")) is not None:
            self.how = "VmHWM"
            self._start = now - (_status("RssFile") or 0)
        elif (highest := _highest_size()) is not None:
            self.how = "ru_maxrss"
            self._start = highest
        else:
            self.how = "unavailable"

    def read(self) -> int | None:
        """Bytes at the peak above the start, or None where nothing can measure it."""
        if self.how == "cuda max_memory_allocated":
            peak = torch.cuda.max_memory_allocated(self.device)
        elif self.how == "VmHWM":
            peak = _status("VmHWM")
            # Those of now, which are at least those of the peak: nothing is told too much, and what is too little
            # is at most what was read in after it.
            peak = None if peak is None else peak - (_status("RssFile") or 0)
        else:
            peak = _highest_size()
        return None if peak is None else max(0, peak - self._start)


def _return_freed_memory() -> None:
    """Return freed memory to the system: what is still held would hide what the run allocates."""
    gc.collect()
    # No glibc, no malloc_trim: other allocators give memory back by rules of their own.
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> bool:
    try:
        CLEAR_REFS.write_text(RESET_PEAK, encoding="ascii")
    except OSError:
        return False
    return _status("VmHWM") is not None


def _status(field: str) -> int | None:
    try:
        for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(f"{field}:"):
                # Linux writes kB and means 1024 bytes (man 5 proc).
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return None
    return None


def _highest_size() -> int | None:
    if resource is None:
        return None
    # Bytes on macOS, 1024 bytes elsewhere (man getrusage).
    value = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return value if sys.platform == "darwin" else value * 1024
