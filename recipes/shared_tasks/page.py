"""Write the table of README.md from the results beside it.

    python recipes/shared_tasks/page.py

A mean over tasks stands only where a method has a run on each of them.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from restuning.bench.report import words
from restuning.bench.report.summary import Summary, summarise

HERE = Path(__file__).parent
PAGE = HERE / "README.md"
START, END = "<!-- table -->\n", "<!-- end of table -->\n"
TASKS = ("cifar100", "caltech101", "rsscn7", "elpv", "dsprites_like_loc", "count_like")
FIRST = ("cifar100", "rsscn7", "dsprites_like_loc")
GRIDS = {"epochs_10": 10, "closed_form": 5, "epochs_40": 40, "auto": 10}
SEEDS = 3


def cell(summary: Summary, task: str, label: str) -> str:
    """Mean and deviation; the number of seeds where there are fewer than three."""
    found = summary.cells.get((task, label))
    fewer = f" ({len(found.runs)})" if found is not None and len(found.runs) < SEEDS else ""
    return ("" if found is None else words.cell(found)) + fewer


def mean(summary: Summary, tasks: tuple[str, ...], label: str) -> str:
    """Over tasks of the means over seeds; empty where a task is missing."""
    if any((task, label) not in summary.cells for task in tasks):
        return ""
    return words.percent(statistics.mean(summary.cells[task, label].mean for task in tasks))


def rows() -> list[list[str]]:
    """One a method and grid."""
    found = []
    for folder, epochs in GRIDS.items():
        if not any((HERE / folder / "runs").rglob("final*.json")):
            continue
        summary = summarise(HERE / folder)
        for label in summary.labels:
            tasks = [task for task in TASKS if (task, label) in summary.cells]
            seconds = summary.cost(label, tasks, lambda run: run["seconds"].get("train_cpu"))
            memory = summary.cost(
                label, tasks, lambda run: run.get("memory", {}).get("step_bytes")
            )
            found.append(
                [label, str(epochs), *(cell(summary, task, label) for task in TASKS),
                 mean(summary, FIRST, label), mean(summary, TASKS, label),
                 words.seconds(seconds), words.size(memory)]
            )  # fmt: skip
    return found


def main() -> None:
    """Put the table between its marks."""
    head = ["method", "epochs", *TASKS, "mean of 3", "mean of 6", "CPU", "step"]
    lines = [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows())]
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    after = rest.partition(END)[2]
    text = f"{before}{START}{chr(10).join(lines)}\n{END}{after}"
    PAGE.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
