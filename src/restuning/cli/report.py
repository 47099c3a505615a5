"""What a run says while it works, and its result as a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

MIB = 2**20


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


def log_to(console: Console) -> Callable[[str], None]:
    """Prints lines of the library, the word that begins one in bold."""

    def log(line: str) -> None:
        first, gap, rest = line.partition("  ")
        text = Text(first, style="bold") + Text(gap + rest) if first and gap else Text(line)
        console.print(text, highlight=False)

    return log
