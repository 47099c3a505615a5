"""Durations in words."""

from __future__ import annotations


def tell_time(seconds: float) -> str:
    """In the unit that fits: `320 ms`, `14.0 s`, `2.5 min`, `14 min`, `3 h 05 min`, `12 h`."""
    if seconds < 1:
        return f"{1e3 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{seconds / 60:.1f} min" if seconds < 600 else f"{minutes} min"
    if minutes < 600:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{round(minutes / 60)} h"
