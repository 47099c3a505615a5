"""Draw docs/ablations.md from the JSON of the ablations that were run.

    python recipes/ablations/page.py

Each folder beside this file is a grid of `restuning bench run digits --ablation NAME`; what has not
been run is not on the page. The table of where a bypass starts is drawn from `recipes/bypass_start.json`.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from restuning._files import read_json
from restuning.bench.report import read_published, summarise, words
from restuning.bench.report.summary import read_parameters
from restuning.bench.report.tables import Table
from restuning.bench.studies.ablations import ABLATIONS

HERE = Path(__file__).parent
BYPASS_START = HERE.parent / "bypass_start.json"
PAGE = HERE.parents[1] / "docs" / "ablations.md"
START = """# Ablations

One command each (`docs/bench.md`); drawn by `python recipes/ablations/page.py` from the JSON in
`recipes/ablations`. Small backbone, small images: what holds here is a hint for large ones, and each table
says what it covers. Published tables are on another backbone and data set. Tables on digits with a bypass in
them were drawn when its lambdas started at 0.5, and at 0.95 in the last layer; where they start now, and what that changes, is the
last table of ours.
"""


def table(name: str) -> Table | None:
    """Accuracy and parameters of an ablation's entries; None where none has been run."""
    folder = HERE / name
    if not any((folder / "runs").rglob("final*.json")):
        return None
    summary = summarise(folder)
    tasks, asked = summary.tasks, [e.partition("=")[0] for e in ABLATIONS[name].entries]
    labels = [n for n in summary.labels if all((t, n) in summary.cells for t in tasks)]
    order = sorted(
        labels, key=lambda n: next((k for k, a in enumerate(asked) if n == a), len(asked))
    )
    rows = [
        [
            label,
            words.format_percent(*summary.mean(label, tasks)),
            words.format_count(summary.cost(label, tasks, read_parameters)),
        ]
        for label in order
    ]
    missing = (
        f" Not run: {len(asked) - len(labels)} of {len(asked)}." if len(labels) < len(asked) else ""
    )
    covers = f"Test accuracy in %, {', '.join(tasks)}. {summary.protocol()}.{missing}"
    return Table(
        f"{name}: {ABLATIONS[name].question}",
        covers,
        ["", "accuracy", "parameters without head"],
        rows,
    )


def table_of_starts() -> Table:
    """Where a bypass starts: test accuracy of every row on every task."""
    report = read_json(BYPASS_START)
    tasks = list(dict.fromkeys(row["task"] for row in report["rows"]))
    lines = []
    for name in dict.fromkeys(row["row"] for row in report["rows"]):
        own = [row for row in report["rows"] if row["row"] == name]
        cells = [[r["test_accuracy"] for r in own if r["task"] == task] for task in tasks]
        means = [statistics.mean(cell) for cell in cells]
        settings = f"{own[0]['epochs']}, {own[0]['lr']:g}"
        accuracy = [words.format_percent(mean) for mean in (*means, statistics.mean(means))]
        lines.append([name, settings, *accuracy])
    return Table(
        "start: Where do the lambdas of a bypass start, and how fast do they learn?",
        f"Test accuracy in %, {report['backbone']} at {report['size']} px, {report['seeds']} seeds, class "
        "tokens stored; settings were chosen on validation images, all 1000 are trained on and the last "
        "checkpoint is tested once. Before, lambda started at 0.5 and at 0.95 in the last layer and learned at the common rate; now at "
        f"0.25 in every one, and at ten times the rate. `{report['command']}`",
        ["", "epochs, rate", *tasks, "mean"],
        lines,
    )


def page() -> str:
    """The whole page."""
    parts = [START]
    for name, ablation in ABLATIONS.items():
        made = table(name)
        if made is not None:
            parts.append(made.markdown())
            if ablation.published:
                parts.append(read_published(ablation.published).markdown())
    parts.append(table_of_starts().markdown())
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
