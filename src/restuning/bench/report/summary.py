"""What a folder of results says: accuracies by task and method, costs, and what is missing."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from restuning._errors import DataError
from restuning.bench.folder import read_grid, read_results, unpack_hits

GROUPS = ("natural", "specialized", "structured", "fine-grained", "")
"""Order of groups in tables."""


@dataclass(frozen=True)
class Cell:
    """The final runs of one method on one task, by seed."""

    runs: dict[int, dict[str, Any]]

    @property
    def accuracies(self) -> list[float]:
        """The accuracy of every run, in the order of the seeds."""
        return [self.runs[seed]["accuracy"] for seed in sorted(self.runs)]

    @property
    def mean(self) -> float:
        """Mean accuracy over seeds."""
        return statistics.mean(self.accuracies)

    @property
    def std(self) -> float | None:
        """Standard deviation of the accuracy over seeds; None for a single seed."""
        return statistics.stdev(self.accuracies) if len(self.runs) > 1 else None

    @property
    def hits(self) -> np.ndarray:
        """Share of seeds that answer each test example rightly, `n`."""
        rows = [unpack_hits(run["hits"], run["count"]) for run in self.runs.values()]
        return np.mean(rows, axis=0)


@dataclass
class Summary:
    """Everything a report is made of.

    Attributes:
        cells: By task and label.
        groups: Of each task.
        labels: In the order of their first appearance by path.
        failures: Results of runs that failed.
        grid: `grid.json`.
        results: All results.
    """

    cells: dict[tuple[str, str], Cell]
    groups: dict[str, str]
    labels: list[str]
    failures: list[dict[str, Any]]
    grid: dict[str, Any]
    results: list[dict[str, Any]] = field(repr=False, default_factory=list)

    @property
    def tasks(self) -> list[str]:
        """The names of all tasks, by group and then by name."""
        return sorted(self.groups, key=lambda t: (_place(self.groups[t]), t))

    def of(self, tasks: Sequence[str]) -> list[str]:
        """Labels that have a result on all these tasks."""
        return [
            label for label in self.labels if all((task, label) in self.cells for task in tasks)
        ]

    def mean(self, label: str, tasks: Sequence[str]) -> tuple[float, float | None]:
        """Mean over tasks, and the standard deviation of that mean over the seeds all tasks have."""
        cells = [self.cells[task, label] for task in tasks]
        # Only seeds that every task has: a mean over other tasks is another figure.
        seeds = sorted(set.intersection(*[set(cell.runs) for cell in cells]))
        by_seed = [statistics.mean(cell.runs[s]["accuracy"] for cell in cells) for s in seeds]
        spread = statistics.stdev(by_seed) if len(by_seed) > 1 else None
        return statistics.mean(cell.mean for cell in cells), spread

    def group_means(self, label: str, tasks: Sequence[str]) -> dict[str, float]:
        """Mean accuracy of every group of these tasks."""
        names = dict.fromkeys(self.groups[task] for task in tasks)
        return {
            name: statistics.mean(
                self.cells[t, label].mean for t in tasks if self.groups[t] == name
            )
            for name in names
        }

    def mean_of_groups(self, label: str, tasks: Sequence[str]) -> float:
        """The mean that VTAB papers print, in which every group counts once."""
        return statistics.mean(self.group_means(label, tasks).values())

    def cost(
        self, label: str, tasks: Sequence[str], of: Callable[[dict[str, Any]], Any]
    ) -> float | None:
        """Median over the runs of a label on these tasks of something in their results."""
        values = [
            value
            for task in tasks
            for run in self.cells[task, label].runs.values()
            if (value := of(run)) is not None
        ]
        return statistics.median(values) if values else None

    def coverage(self) -> list[tuple[str, list[str]]]:
        """Sets of tasks worth a table: all of them, and those that every label has."""
        whole = self.tasks
        # What can be compared fairly when a grid is half done.
        common = [t for t in whole if all((t, label) in self.cells for label in self.labels)]
        sets = [("all tasks", whole)] if self.of(whole) else []
        if common and common != whole:
            sets.append(("the tasks that every method has", common))
        return sets

    def protocol(self) -> str:
        """The protocol in one sentence."""
        protocol = self.grid["protocol"]
        settings = protocol["settings"]
        runs = [run for cell in self.cells.values() for run in cell.runs.values()]
        sizes = sorted({len(cell.runs) for cell in self.cells.values()})
        seeds = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        chosen = sorted({k for run in runs for k in run["setting"] if run["chosen"]})
        rates = sorted({run["settings"]["lr"] for run in runs})
        words = ", ".join(map(str, rates[:6]))
        choice = f"{', '.join(chosen)} chosen on validation" if chosen else "nothing chosen"
        return (
            f"{protocol['backbone']}, {settings['epochs']} epochs, batch {settings['batch_size']}, "
            f"AdamW, highest learning rate {words} ({choice}), precision "
            f"{settings['precision']}, {seeds} seed{'s' if seeds != '1' else ''}; trained on the "
            "training and validation splits, the last checkpoint tested once"
        )


def read_parameters(run: dict[str, Any]) -> int:
    """Number of trained parameters, without the head."""
    return run["parameters"]["without_head"]


def read_memory(run: dict[str, Any]) -> int | None:
    """Bytes of a training step above weights, moments and batch, as it was trained."""
    return run["memory"].get("step_bytes")


def read_training_seconds(run: dict[str, Any]) -> float | None:
    """Processor seconds of training, with what computing the features once took."""
    # Features are computed once and read by many runs; each is charged for all of it.
    trained, features = run["seconds"].get("train_cpu"), run["seconds"].get("features_cpu", 0.0)
    return None if trained is None or features is None else trained + features


def read_inference(run: dict[str, Any]) -> float | None:
    """Time of a forward over the bare backbone's, taken in turns."""
    tuned, bare = run["seconds"].get("inference"), run["seconds"].get("bare_inference")
    return tuned / bare if tuned and bare else None


def summarise(folder: Path, tasks: Sequence[str] = (), labels: Sequence[str] = ()) -> Summary:
    """Read a grid's results.

    Args:
        folder: Of the grid.
        tasks, labels: To keep; empty for all.

    Raises:
        FormatError: No grid there, or a malformed result.
        DataError: No final run is done.
    """
    results = read_results(folder)
    selected = [
        r
        for r in results
        if (not tasks or r["task"] in tasks) and (not labels or r["label"] in labels)
    ]
    runs: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    # Searches saw the validation split; tables tell of final runs only.
    for r in selected:
        if r["stage"] == "final" and r["status"] == "done":
            runs.setdefault((r["task"], r["label"]), {})[r["seed"]] = r
    if not runs:
        raise DataError(
            "no finished run to report",
            where=str(folder),
            found=f"{len(results)} results",
            fix="let the grid go on",
        )
    order = list(labels) or sorted({label for _, label in runs}, key=lambda n: _first(runs, n))
    return Summary(
        {key: Cell(value) for key, value in runs.items()},
        {task: next(iter(runs[task, label].values())).get("group", "") for task, label in runs},
        [label for label in order if any(label == have for _, have in runs)],
        [r for r in selected if r["status"] == "failed"],
        read_grid(folder),
        results,
    )


def _first(runs: dict[tuple[str, str], dict[int, dict[str, Any]]], label: str) -> tuple[int, str]:
    """Sort key of methods: those with the fewest parameters come first."""
    results = [r for (_, have), by_seed in runs.items() if have == label for r in by_seed.values()]
    # The name breaks ties, so that the order is the same every time.
    return min(read_parameters(r) for r in results), label


def _place(group: str) -> int:
    return GROUPS.index(group) if group in GROUPS else len(GROUPS)
