"""Numbers as a report writes them."""

from __future__ import annotations

from restuning.bench.report.summary import Cell


def percent(value: float, spread: float | None = None) -> str:
    """`87.3 ± 0.4`."""
    return f"{100 * value:.1f}" + (f" ± {100 * spread:.1f}" if spread is not None else "")


def cell(value: Cell | None) -> str:
    """Mean and standard deviation over seeds, `-` where there is no run."""
    return "-" if value is None else percent(value.mean, value.std)


def count(value: float | None) -> str:
    """Parameters."""
    if value is None:
        return "-"
    for limit, word in ((1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.2f} {word}"
    return f"{value:.0f}"


def size(value: float | None) -> str:
    """Bytes."""
    if value is None:
        return "-"
    for limit, word in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= limit:
            return f"{value / limit:.1f} {word}"
    return f"{value:.0f} B"


def seconds(value: float | None) -> str:
    """A time."""
    if value is None:
        return "-"
    if value < 1:
        return f"{1e3 * value:.1f} ms"
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min"


def times(value: float | None) -> str:
    """A ratio."""
    return "-" if value is None else f"{value:.2f} x"
