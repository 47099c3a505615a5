"""How `train --method auto` shows what was chosen, and among what."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from restuning.cli.frame import time_in_words
from restuning.search import Choice, bytes_in_words


def show_choice(choice: Choice, console: Console) -> None:
    """One row a candidate, the one that was taken in bold."""
    table = Table(
        title=f"choice on {choice.examples} validation examples",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    table.add_column("method", no_wrap=True)
    for column in ("validation", "memory", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    for row in choice.rows:
        taken = row["method"] == choice.method
        if row["status"] == "left out":
            table.add_row(row["method"], "-", "", "", f"left out: {row['why']}", style="dim")
            continue
        early = " (ended early)" if row["status"] == "stopped" else ""
        pieces = f", {row['accumulate']} pieces a batch" if row["accumulate"] > 1 else ""
        table.add_row(
            row["method"],
            f"{100 * row['val_accuracy']:.1f} ± {100 * row['standard_error']:.1f} %",
            bytes_in_words(row["memory_bytes"]) if row["memory_bytes"] else "?",
            time_in_words(row["seconds"]),
            f"{row['why']}{early}{pieces}",
            style="bold" if taken else "",
        )
    console.print(table)
