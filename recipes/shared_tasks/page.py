"""Write the tables of README.md from the results beside it.

    python recipes/shared_tasks/page.py

A mean over tasks stands only where a method has a run on each of them.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

from restuning._files import read_json
from restuning.bench.report import Summary, summarise, words

HERE = Path(__file__).parent
PAGE = HERE / "README.md"
TASKS = ("cifar100", "caltech101", "rsscn7", "elpv", "dsprites_like_loc", "count_like")
OTHERS = ("cifar10", "flowers12", "pacs_sketch", "sign_digits", "brain_mri", "track_curve")
FIRST = ("cifar100", "rsscn7", "dsprites_like_loc")
GRIDS = {"epochs_10": 10, "closed_form": 5, "epochs_40": 40, "auto": 10}
OWN_SIZE = ("detached_224", "inside_224", "inside_224_more")
"""Grids at 224 px, the size that the backbone was trained at."""
ONE = {"peft-lora": "lora"}
"""A rival that had another name when the grid was made: one row."""
CONVOLUTIONS = ("mobilenet_224",)
"""The same of a convolutional network."""
SEEDS = 3
AUTO, LORA = "auto", "lora"
TRIED = ("linear", "res-tuning-bypass", "ridge", "mixing-bypass", "res-tuning")
"""The candidates of the runs in `auto/`."""


def cell(summary: Summary, task: str, label: str) -> str:
    """Mean and deviation; the number of seeds where there are fewer than three."""
    found = summary.cells.get((task, label))
    fewer = f" ({len(found.runs)})" if found is not None and len(found.runs) < SEEDS else ""
    return ("" if found is None else words.format_cell(found)) + fewer


def mean(summary: Summary, tasks: tuple[str, ...], label: str) -> str:
    """Over tasks of the means over seeds; empty where a task is missing."""
    if any((task, label) not in summary.cells for task in tasks):
        return ""
    return words.format_percent(statistics.mean(summary.cells[task, label].mean for task in tasks))


def costs(summary: Summary, tasks: list[str], label: str) -> list[str]:
    """Processor time of training and memory of a step."""
    seconds = summary.cost(label, tasks, lambda run: run["seconds"].get("train_cpu"))
    memory = summary.cost(label, tasks, lambda run: run.get("memory", {}).get("step_bytes"))
    return [words.format_seconds(seconds), words.format_size(memory)]


def rows() -> list[list[str]]:
    """One a method and grid."""
    found = []
    for folder, epochs in GRIDS.items():
        if not any((HERE / folder / "runs").rglob("final*.json")):
            continue
        summary = summarise(HERE / folder)
        for label in summary.labels:
            tasks = [task for task in TASKS if (task, label) in summary.cells]
            found.append(
                [
                    label,
                    str(epochs),
                    *(cell(summary, task, label) for task in TASKS),
                    mean(summary, FIRST, label),
                    mean(summary, TASKS, label),
                    *costs(summary, tasks, label),
                ]
            )
    return found


def own_size(
    folders: tuple[str, ...], tasks: tuple[str, ...], means: tuple[tuple[str, ...], ...], cost: bool
) -> list[list[str]]:
    """One a method at 224 px; epochs as each of them has by default, ten inside the backbone.

    Args:
        folders: Of grids.
        tasks: That have a column.
        means: Tasks of which each mean is.
        cost: Whether costs are told.
    """
    there = [f for f in folders if any((HERE / f / "runs").rglob("final*.json"))]
    named: dict[str, list[tuple[Summary, str]]] = {}
    for summary in map(summarise, (HERE / folder for folder in there)):
        for label in summary.labels:
            if any((task, label) in summary.cells for task in tasks):
                named.setdefault(ONE.get(label, label), []).append((summary, label))
    found = []
    for name, several in named.items():
        # Each task has its runs in one of the grids.
        cells = {
            (task, name): summary.cells[task, label]
            for summary, label in several
            for task in TASKS + OTHERS
            if (task, label) in summary.cells
        }
        whole, label = several[0]
        own = [task for task in tasks if (task, label) in whole.cells]
        joined = replace(whole, cells=cells)
        found.append(
            [
                name,
                *(cell(joined, task, name) for task in tasks),
                *(mean(joined, each, name) for each in means),
                *(costs(whole, own, label) if cost else ()),
            ]
        )
    return found


def single_methods() -> dict[str, dict[str, float]]:
    """Mean test accuracy by task and by method (with its epochs where they are not the first grid's)."""
    found: dict[str, dict[str, float]] = {task: {} for task in TASKS}
    for folder, epochs in GRIDS.items():
        if folder == AUTO:
            continue
        for (task, label), cell_of in summarise(HERE / folder).cells.items():
            more = "" if folder == "epochs_10" else f" ({epochs} epochs)"
            found[task][label + more] = cell_of.mean
    return found


def choices() -> list[list[str]]:
    """One a task and seed of `auto`: its trials on validation, what it took, and what came of it."""
    single, first = single_methods(), summarise(HERE / "epochs_10")
    found, behind, costs = [], [], []
    runs = [read_json(file) for file in sorted((HERE / AUTO / "runs").rglob("final*.json"))]
    for task in TASKS:
        name, best = max(single[task].items(), key=lambda each: each[1])
        lora = first.cost(LORA, [task], lambda run: run["seconds"].get("train_cpu"))
        for run in (run for run in runs if run["task"] == task):
            trials = {row["method"]: row for row in run["chosen"]["rows"]}
            told = [
                f"{100 * row['val_accuracy']:.1f} ({row['cross_entropy']:.2f})"
                + ("*" if row["status"] == "stopped" else "")
                if row["status"] != "left out"
                else "-"
                for row in trials.values()
            ]
            behind.append(run["accuracy"] - best)
            costs.append(run["seconds"]["train_cpu"] / lora)
            found.append(
                [
                    task,
                    str(run["seed"]),
                    *told,
                    run["setting"]["method"],
                    words.format_percent(run["accuracy"]),
                    f"{words.format_percent(best)} {name}",
                    f"{100 * behind[-1]:+.1f}",
                    words.format_seconds(run["seconds"]["train_cpu"]),
                    f"{costs[-1]:.2f}",
                ]
            )
    if found:
        mean_of = [
            "mean",
            *[""] * (len(found[0]) - 5),
            "",
            f"{100 * statistics.mean(behind):+.1f}",
            "",
            f"{statistics.mean(costs):.2f}",
        ]
        found.append(mean_of)
    return found


def filled(text: str, mark: str, head: list[str], lines: list[list[str]]) -> str:
    """A page with a table put between its marks."""
    start, end = f"<!-- {mark} -->\n", f"<!-- end of {mark} -->\n"
    before, _, rest = text.partition(start)
    table = "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))
    return f"{before}{start}{table}\n{end}{rest.partition(end)[2]}"


def drawn(text: str) -> str:
    """The page with its tables between their marks."""
    head = ["method", "epochs", *TASKS, "mean of 3", "mean of 6", "CPU", "step"]
    text = filled(text, "table", head, rows())
    head = ["method", *TASKS, "mean of 6", "CPU", "step"]
    text = filled(text, "own size", head, own_size(OWN_SIZE, TASKS, (TASKS,), cost=True))
    head, both = ["method", *OTHERS, "mean of 6", "mean of all 12"], (OTHERS, TASKS + OTHERS)
    text = filled(text, "other tasks", head, own_size(OWN_SIZE[:1], OTHERS, both, cost=False))
    head = ["method", *TASKS, "mean of 6"]
    text = filled(text, "convolutions", head, own_size(CONVOLUTIONS, TASKS, (TASKS,), cost=False))
    head = ["method", *OTHERS, "mean of 6", "mean of all 12"]
    text = filled(
        text, "convolutions on others", head, own_size(CONVOLUTIONS, OTHERS, both, cost=False)
    )
    head = [
        "task",
        "seed",
        *TRIED,
        "taken",
        "test",
        "best by hindsight",
        "behind",
        "CPU",
        "of LoRA",
    ]
    return filled(text, "choices", head, choices())


if __name__ == "__main__":
    PAGE.write_text(drawn(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
