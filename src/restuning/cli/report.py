"""What a run says while it works, and its result as a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from restuning.cli.common import time_in_words
from restuning.cli.visible import make_visible

if TYPE_CHECKING:
    from restuning.search import Choice

MIB = 2**20


def show_result(rows: list[dict[str, Any]], console: Console) -> None:
    """One row a method."""
    from restuning.training.run import SHORT, measured_on

    split = measured_on(rows[0])
    table = Table(title="result", title_justify="left")
    table.add_column("method", no_wrap=True)
    for column in (f"{split} accuracy", "trained", "without head", "memory above weights", "time"):
        table.add_column(column, justify="right")
    for row in rows:
        accuracy, peak = row[f"{SHORT[split]}_accuracy"], row["peak_memory_bytes"]
        table.add_row(
            row["method"],
            "-" if accuracy is None else f"{accuracy:.2%}",
            f"{row['trainable_parameters']:,}",
            f"{row['tuner_parameters']:,}",
            "-" if peak is None else f"{peak / MIB:,.0f} MiB",
            f"{row['seconds']:.1f} s",
        )
    console.print(table)
    if rows[0]["test_accuracy"] is None:
        console.print(
            "no test split: these are accuracies on the validation split"
            if split == "validation"
            else "no test split, and no validation split that was held out: no accuracy is known",
            soft_wrap=True,
        )


def log_to(console: Console) -> Callable[[str], None]:
    """Prints lines of the library, the word that begins one in bold, a run after a gap."""
    before = ""

    def log(line: str) -> None:
        nonlocal before
        if before.startswith(" ") and not line.startswith(" "):
            console.print()
        before = line
        # A name with a line end is no line of its own.
        line = make_visible(line)
        # Lines of the library begin with a word and two spaces, or are told below such a line.
        first, gap, rest = line.partition("  ")
        styled = Text(first, style="bold") + Text(gap + rest) if first and gap else Text(line)
        # Never broken by us: a path that is copied from a line must be whole.
        console.print(styled, soft_wrap=True)

    return log


def show_choice(choice: Choice, console: Console) -> None:
    """One row a candidate, the one that was taken in bold."""
    from restuning.search import format_bytes

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
        # It was never trained: it has a reason in place of figures.
        if row["status"] == "left out":
            table.add_row(row["method"], "-", "", "", f"left out: {row['why']}", style="dim")
            continue
        early = " (ended early)" if row["status"] == "stopped" else ""
        pieces = f", {row['accumulate']} pieces a batch" if row["accumulate"] > 1 else ""
        table.add_row(
            row["method"],
            f"{100 * row['val_accuracy']:.1f} ± {100 * row['standard_error']:.1f} %",
            format_bytes(row["memory_bytes"]) if row["memory_bytes"] else "?",
            time_in_words(row["seconds"]),
            f"{row['why']}{early}{pieces}",
            style="bold" if taken else "",
        )
    console.print(table)
