"""What a run says while it works, and its result as a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from restuning.cli.common import time_in_words
from restuning.cli.speech import is_quiet
from restuning.cli.visible import make_visible

if TYPE_CHECKING:
    from restuning.search import Choice

MIB = 2**20


def show_result(rows: list[dict[str, Any]], console: Console) -> None:
    """One row a method."""
    from restuning.training.run import measured_on, metric_of, tell_score

    split = measured_on(rows[0])
    table = Table(title="result", title_justify="left")
    table.add_column("method", no_wrap=True)
    metric = metric_of(rows[0])
    shown = metric.replace("_", " ")
    for column in (f"{split} {shown}", "trained", "without head", "memory above weights", "time"):
        table.add_column(column, justify="right")
    for row in rows:
        peak = row["peak_memory_bytes"]
        table.add_row(
            row["method"],
            tell_score(row, split),
            f"{row['trainable_parameters']:,}",
            f"{row['tuner_parameters']:,}",
            "-" if peak is None else f"{peak / MIB:,.0f} MiB",
            f"{row['seconds']:.1f} s",
        )
    console.print(table)
    if rows[0][f"test_{metric}"] is None:
        console.print(
            f"no test split: {shown} is that of the validation split"
            if split == "validation"
            else f"no test split, and no validation split that was held out: no {shown} is known",
            soft_wrap=True,
        )


def show_columns(rows: list[dict[str, Any]], console: Console) -> None:
    """One row a column of answers, each with the figure of its problem."""
    from restuning.training.run import measured_on, metric_of, tell_score

    table = Table(title="result", title_justify="left")
    table.add_column("column", no_wrap=True)
    for column in ("figure", "measured on", "trained", "time"):
        table.add_column(column, justify="right")
    for row in rows:
        split, metric = measured_on(row), metric_of(row)
        table.add_row(
            make_visible(row["column"]),
            f"{metric.replace('_', ' ')} {tell_score(row, split)}",
            split,
            f"{row['trainable_parameters']:,}",
            f"{row['seconds']:.1f} s",
        )
    console.print(table)


def log_to(console: Console) -> Callable[[str], None]:
    """Prints lines of the library, the word that begins one in bold, a run after a gap; none of a quiet command."""
    before = ""
    if is_quiet():
        return lambda line: None

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


def _tell_validation(row: dict[str, Any]) -> str:
    from restuning.search.rule import score_of

    score, noise = score_of(row) or 0.0, row["standard_error"]
    if "metric" in row:
        return f"{row['metric'].replace('_', ' ')} {score:.3f} ± {noise:.3f}"
    return f"{100 * score:.1f} ± {100 * noise:.1f} %"


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
            _tell_validation(row),
            format_bytes(row["memory_bytes"]) if row["memory_bytes"] else "?",
            time_in_words(row["seconds"]),
            f"{row['why']}{early}{pieces}",
            style="bold" if taken else "",
        )
    console.print(table)
