"""The report as one HTML file that needs nothing else, and as Markdown with its plots beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from restuning._errors import MissingExtraError, warn
from restuning.bench.report import figures, words
from restuning.bench.report.statistics import paired_bootstrap
from restuning.bench.report.summary import (
    Summary,
    read_inference,
    read_memory,
    read_parameters,
    read_training_seconds,
    summarise,
)
from restuning.bench.report.tables import (
    Table,
    read_published,
    tabulate_accuracy,
    tabulate_choices,
    tabulate_costs,
)

REFERENCES = ("lora", "peft-lora", "linear")
"""Methods that differences are told against, the first that is there."""


def write_report(
    folder: Path,
    out: Path,
    tasks: Sequence[str] = (),
    labels: Sequence[str] = (),
    suites: Sequence[str] = (),
    reference: str | None = None,
) -> tuple[Path, Path]:
    """Write `report.html` and `report.md` with its plots, from the results of a grid alone.

    Args:
        folder: Of the grid.
        out: Where to write.
        tasks, labels: To keep; empty for all.
        suites: Published tables to show beside, see `read_published`.
        reference: The method that others are compared with; default LoRA, else linear probing.

    Returns:
        The HTML and the Markdown file.

    Raises:
        FormatError: A result is malformed.
        DataError: Nothing is finished.
    """
    summary = summarise(folder, tasks, labels)
    parts = summary.coverage() or [("the tasks of each method", summary.tasks)]
    tables: list[tuple[str, list[Table], dict[str, str]]] = []
    for name, covered in parts:
        both = [tabulate_accuracy(summary, name, covered), tabulate_costs(summary, name, covered)]
        # Each set of tasks has its own: means over different tasks cannot be compared.
        tables.append((name, both, draw_plots(summary, covered, reference)))
    printed = [read_published(suite) for suite in suites]
    settings = tabulate_choices(summary)
    out.mkdir(parents=True, exist_ok=True)
    page, text = out / "report.html", out / "report.md"
    page.write_text(_write_html(summary, tables, printed, settings), encoding="utf-8")
    text.write_text(_write_markdown(summary, tables, printed, settings, out), encoding="utf-8")
    return page, text


def draw_plots(summary: Summary, tasks: Sequence[str], reference: str | None) -> dict[str, str]:
    """Draw the plots of a set of tasks: SVG texts by title."""
    labels = summary.of(tasks)
    drawings = {
        "Accuracy against parameters": figures.draw_scatter(
            summary, labels, tasks, read_parameters, "trained parameters without the head"
        ),
        "Accuracy against training memory": figures.draw_scatter(
            summary, labels, tasks, read_memory, "MiB of a step above weights", 2**20
        ),
        "Accuracy against training time": figures.draw_scatter(
            summary, labels, tasks, read_training_seconds, "processor seconds of a run"
        ),
        "Accuracy against inference time": figures.draw_scatter(
            summary, labels, tasks, read_inference, "forward over the bare backbone's"
        ),
        "Groups of tasks": figures.draw_group_bars(summary, labels, tasks),
        "Mean ranks": _draw_ranks(summary, labels, tasks),
    }
    # What is there of them: a grid need not have either.
    against = reference or next((n for n in REFERENCES if n in labels), labels[0])
    if against in labels and len(labels) > 1:
        others = [n for n in labels if n != against]
        compared = paired_bootstrap(summary, others, against, tasks)
        drawings[f"Difference to {against}"] = figures.draw_intervals(compared, against, labels)
    return {title: svg for title, svg in drawings.items() if svg is not None}


def _draw_ranks(summary: Summary, labels: Sequence[str], tasks: Sequence[str]) -> str | None:
    try:
        return figures.draw_ranks(summary, labels, tasks)
    except MissingExtraError as error:
        # One plot of many: a grid that took a night is reported without it.
        warn("a report without its plot of mean ranks", found=error.what, fix=error.fix)
        return None


def _write_html(
    summary: Summary,
    parts: list[tuple[str, list[Table], dict[str, str]]],
    beside: list[Table],
    chosen: Table | None,
) -> str:
    # Here: reading results alone draws nothing.
    from jinja2 import Environment, StrictUndefined

    text = resources.files("restuning.bench.report").joinpath("template.html").read_text("utf-8")
    # Names of tasks and errors of runs are the user's; what is drawn here alone is marked as safe.
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(text)
    return page.render(
        backbone=summary.grid["protocol"]["backbone"],
        protocol=summary.protocol(),
        tiles=_count(summary),
        parts=parts,
        beside=beside,
        chosen=chosen,
        runs=len(summary.results),
        versions=", ".join(f"{k} {v}" for k, v in summary.grid["versions"].items()),
        failures=[{"error": "", **each} for each in summary.failures],
        find_best=_find_best,
    )


def _count(summary: Summary) -> list[tuple[str, str]]:
    """What stands in large figures at the top, and what each counts."""
    tasks = summary.tasks
    tiles = [
        (str(len(tasks)), "tasks"),
        (str(len(summary.labels)), "methods"),
        (str(sum(len(c.runs) for c in summary.cells.values())), "final runs"),
    ]
    if labels := summary.of(tasks):
        best = max(labels, key=lambda n: summary.mean(n, tasks)[0])
        tiles.append(
            (f"{words.format_percent(summary.mean(best, tasks)[0])} %", f"best mean: {best}")
        )
    return tiles


def _find_best(row: list[str]) -> set[int]:
    """The places in a row where its highest accuracy stands."""
    values = {n: float(c.split(" ")[0]) for n, c in enumerate(row) if n and c != "-"}
    return {n for n, v in values.items() if v == max(values.values())}


def _write_markdown(
    summary: Summary,
    parts: list[tuple[str, list[Table], dict[str, str]]],
    beside: list[Table],
    chosen: Table | None,
    out: Path,
) -> str:
    lines = [f"# {summary.grid['protocol']['backbone']}", "", f"{summary.protocol()}.", ""]
    for number, (name, tables, drawn) in enumerate(parts):
        lines += [f"## {name[:1].upper() + name[1:]}", ""]
        lines += [table.markdown() for table in tables]
        for title, svg in drawn.items():
            # Numbered: two sets of tasks have plots of the same titles.
            file = f"{re.sub(r'[^a-z0-9]+', '-', title.lower())}-{number}.svg"
            (out / file).write_text(svg, encoding="utf-8")
            lines += [f"![{title}]({file})", ""]
    if chosen is not None:
        lines.append(chosen.markdown())
    if beside:
        lines += ["## Published results", ""]
        lines += [table.markdown() for table in beside]
    if summary.failures:
        lines += [f"{len(summary.failures)} runs failed:", ""]
        lines += [
            f"- {r['task']}, {r['label']}, {r['stage']} seed {r['seed']}: "
            f"{r.get('error', '').splitlines()[0][:200]}"
            for r in summary.failures
        ]
    return "\n".join(lines) + "\n"
