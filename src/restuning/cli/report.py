"""The comparison as a table, a picture and JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

MIB = 2**20
_COLOURS = ("#8c8c8c", "#2a6fbb", "#d9822b", "#3a9a5b", "#8e5ea2")


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """One row a method."""
    table = Table(title="result", title_justify="left")
    table.add_column("method", no_wrap=True)
    for column in ("test accuracy", "trained", "without head", "memory above weights", "time"):
        table.add_column(column, justify="right")
    for row in rows:
        accuracy, peak = row["test_accuracy"], row["peak_memory_bytes"]
        table.add_row(
            row["method"],
            "-" if accuracy is None else f"{accuracy:.2%}",
            f"{row['trainable_parameters']:,}",
            f"{row['tuner_parameters']:,}",
            "-" if peak is None else f"{peak / MIB:,.0f} MiB",
            f"{row['seconds']:.1f} s",
        )
    console.print(table)


def comparison(rows: list[dict[str, Any]], folder: Path, title: str) -> None:
    """Write `comparison.json` and `comparison.png`."""
    (folder / "comparison.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = [row["method"] for row in rows]
    panels = [
        ("test accuracy (%)", [100 * (row["test_accuracy"] or 0) for row in rows], "{:.2f}"),
        (
            "memory above weights (MiB)",
            [(row["peak_memory_bytes"] or 0) / MIB for row in rows],
            "{:.0f}",
        ),
        (
            "trained parameters (thousand)",
            [row["trainable_parameters"] / 1e3 for row in rows],
            "{:.1f}",
        ),
        ("training time (s)", [row["seconds"] for row in rows], "{:.1f}"),
    ]
    figure, axes = plt.subplots(1, len(panels), figsize=(14, 3.6), constrained_layout=True)
    for axis, (label, values, form) in zip(axes, panels, strict=True):
        bars = axis.bar(names, values, color=_COLOURS[: len(names)], width=0.65)
        axis.bar_label(bars, [form.format(v) for v in values], padding=2, fontsize=9)
        axis.set_title(label, fontsize=10)
        axis.tick_params(axis="x", labelsize=8, rotation=12)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.15)
    lowest = min(panels[0][1])
    # Bars that differ by a point look the same from zero; the axis says where it starts.
    axes[0].set_ylim(max(0, lowest - 3 * (100 - lowest) / 2), 100.5)
    figure.suptitle(title)
    figure.savefig(folder / "comparison.png", dpi=130)
    plt.close(figure)
