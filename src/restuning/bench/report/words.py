"""Numbers as a report writes them."""

from __future__ import annotations

from restuning.bench.report.summary import Cell


def format_percent(value: float, spread: float | None = None) -> str:
    """Write a share in percent, with its spread where there is one: `87.3 ± 0.4`."""
    return f"{100 * value:.1f}" + (f" ± {100 * spread:.1f}" if spread is not None else "")


def format_cell(value: Cell | None) -> str:
    """Write mean and standard deviation over seeds; `-` where there is no run."""
    return "-" if value is None else format_percent(value.mean, value.std)


def format_count(value: float | None) -> str:
    """Write a number of parameters: `1.20 M`, `387.31 k`."""
    if value is None:
        return "-"
    for limit, word in ((1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.2f} {word}"
    return f"{value:.0f}"


def format_size(value: float | None) -> str:
    """Write a number of bytes: `1.5 GiB`."""
    if value is None:
        return "-"
    for limit, word in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= limit:
            return f"{value / limit:.1f} {word}"
    return f"{value:.0f} B"


def format_seconds(value: float | None) -> str:
    """Write a time in the unit that fits: `3.2 ms`, `14.0 s`, `2.5 min`."""
    if value is None:
        return "-"
    if value < 1:
        return f"{1e3 * value:.1f} ms"
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min"


def format_ratio(value: float | None) -> str:
    """Write a ratio: `1.25 x`."""
    return "-" if value is None else f"{value:.2f} x"
