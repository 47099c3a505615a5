"""The tables of a report, as rows of texts for Markdown and HTML alike."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from restuning.bench.report import words
from restuning.bench.report.summary import (
    Summary,
    read_inference,
    read_memory,
    read_parameters,
    read_training_seconds,
)


@dataclass(frozen=True)
class Table:
    """Title, a line of what it covers, names of columns, and rows whose first cell is a name."""

    title: str
    covers: str
    columns: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Write the table as Markdown."""
        lines = [f"### {self.title}", "", self.covers, ""]
        lines.append("| " + " | ".join(_escape(c) for c in self.columns) + " |")
        lines.append("|---|" + "---:|" * (len(self.columns) - 1))
        lines += ["| " + " | ".join(_escape(c) for c in row) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    # A row is a line: names of folders may hold line ends.
    return " ".join(text.replace("|", "\\|").splitlines())


def tabulate_accuracy(summary: Summary, name: str, tasks: Sequence[str]) -> Table:
    """Tabulate test accuracy: a row for each task, a column for each method, then means."""
    labels = summary.of(tasks)
    rows = []
    for task in tasks:
        cells = [words.format_cell(summary.cells.get((task, label))) for label in labels]
        rows.append([f"{task} ({summary.groups[task] or 'task'})", *cells])
    # Of one task the mean is the row above.
    if len(tasks) > 1:
        means = {label: summary.group_means(label, tasks) for label in labels}
        for group in next(iter(means.values()), {}):
            if len({summary.groups[t] for t in tasks}) > 1:
                rows.append(
                    [
                        f"mean of {group or 'others'}",
                        *[words.format_percent(means[label][group]) for label in labels],
                    ]
                )
        if len({summary.groups[t] for t in tasks}) > 1:
            rows.append(
                [
                    "mean of groups",
                    *[words.format_percent(summary.mean_of_groups(n, tasks)) for n in labels],
                ]
            )
        rows.append(
            ["mean of tasks", *[words.format_percent(*summary.mean(n, tasks)) for n in labels]]
        )
    covers = f"Test accuracy in %, mean ± standard deviation over seeds. {summary.protocol()}."
    return Table(f"Accuracy, {name} ({len(tasks)})", covers, ["task", *labels], rows)


COSTS: list[tuple[str, Callable[[dict[str, Any]], Any], Callable[[float | None], str]]] = [
    ("parameters without head", read_parameters, words.format_count),
    ("with head", lambda r: r["parameters"]["trained"], words.format_count),
    ("step memory", read_memory, words.format_size),
    ("on images", lambda r: r["memory"].get("live_step_bytes"), words.format_size),
    ("step", lambda r: r["seconds"]["step"], words.format_seconds),
    ("training, processor", read_training_seconds, words.format_seconds),
    ("whole run", lambda r: r["seconds"]["whole"], words.format_seconds),
    ("inference / bare", read_inference, words.format_ratio),
    ("file", lambda r: r.get("file_bytes"), words.format_size),
]


def _count_tasks(tasks: Sequence[str]) -> str:
    return "1 task" if len(tasks) == 1 else f"{len(tasks)} tasks"


def tabulate_costs(summary: Summary, name: str, tasks: Sequence[str]) -> Table:
    """Tabulate what each method costs, as medians over its runs."""
    labels = summary.of(tasks)
    rows = [
        [label, *[tell(summary.cost(label, tasks, of)) for _, of, tell in COSTS]]
        for label in labels
    ]
    # Times of different machines do not belong in one column: at least they are named.
    machines = sorted(
        {
            f"{r['hardware'].get('gpu') or r['hardware']['cpu']}, threads: {r['hardware']['threads']}"
            for r in summary.results
            if r["status"] == "done"
        }
    )
    covers = (
        f"Medians over runs on {_count_tasks(tasks)}. Step memory is counted above weights, moments "
        "and batch, for the way the method was trained (detached ones from stored features) and, "
        "next to it, for training on images; processor time of training includes computing the "
        "features once; inference is a forward over the bare backbone's, taken in turns. Step and "
        f"whole run are times on the wall. {'; '.join(machines)}."
    )
    return Table(f"Costs, {name}", covers, ["method", *[c for c, _, _ in COSTS]], rows)


def read_published(suite: str) -> Table:
    """Read a published table as its paper prints it.

    Args:
        suite: "vtab-1k", "cifar100", "fgvc", "combinations", "bypass" or "original-unbound".
    """
    table = published_tables()[suite]
    rows = [
        [name, *["-" if v is None else f"{v:g}" for v in row]]
        for name, row in table["rows"].items()
    ]
    return Table(
        f"Published: {table['title']}",
        f"As printed in {table['source']}; not measured here.",
        ["method", *table["columns"]],
        rows,
    )


def published_tables() -> dict[str, Any]:
    """All published tables by suite: `title`, `source`, `columns`, and `rows` by method."""
    file = resources.files("restuning.bench.report").joinpath("published.json")
    return json.loads(file.read_text(encoding="utf-8"))


def tabulate_choices(summary: Summary) -> Table | None:
    """Tabulate the settings chosen on validation and on how many tasks; None if nothing was chosen."""
    counted: dict[tuple[str, str], int] = {}
    for (_, label), cell in summary.cells.items():
        # All seeds of a task share its search, hence its setting.
        run = next(iter(cell.runs.values()))
        if run["chosen"]:
            setting = ", ".join(f"{k}={v}" for k, v in run["setting"].items())
            counted[label, setting] = counted.get((label, setting), 0) + 1
    if not counted:
        return None
    rows = [[label, setting, str(n)] for (label, setting), n in sorted(counted.items())]
    return Table(
        "Settings chosen",
        "On the validation split, one seed.",
        ["method", "setting", "tasks"],
        rows,
    )
