"""Several small tasks that answer together, against one of the same number of parameters.

    python recipes/ensembles.py

On the embedded backbone and digits: three bypasses of rank 4 with seeds 0 to 2 against one of rank
12 (three seeds of it), each with its head; then members of different methods, which err on
different images. Three bypass tasks cost one backbone forward, so such an ensemble is nearly free.
Writes `recipes/ensembles.json`; a few minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from restuning.bench import (
    Bench,
    GridProtocol,
    Job,
    find_tasks,
    list_runs,
    open_grid,
    parse_entries,
    run_grid,
)
from restuning.bench.measure import describe_hardware, read_versions
from restuning.bench.studies.ensembles import disagreement, ensemble_accuracy, predict_probabilities
from restuning.bench.studies.load_trained import load_trained
from restuning.training import FitSettings

SEEDS = 3
METHODS = "linear,small=res-tuning-bypass:rank=4,large=res-tuning-bypass:rank=12,res-tuning"


def main() -> None:
    """Train what is missing, let members answer together, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/ensembles"))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    protocol = GridProtocol("restuning-tiny", settings=FitSettings(epochs=args.epochs, lr=1e-2))
    runs = list_runs(protocol, find_tasks("digits"), parse_entries(METHODS), SEEDS)
    open_grid(args.out, protocol, runs)
    run_grid(Job(protocol, args.out, runs, keep=True, threads=args.threads))
    bench = Bench(protocol, args.out)
    answers: dict[tuple[str, int], torch.Tensor] = {}
    parameters: dict[str, int] = {}
    for run in runs:
        tuned, result = load_trained(bench, run)
        data = bench.data(run.task).apart
        answers[run.entry.label, run.seed] = predict_probabilities(tuned, data.test, data.collate)
        parameters[run.entry.label] = result["parameters"]["trained"]
    labels = data.test.labels

    def row(name: str, groups: list[list[tuple[str, int]]]) -> dict[str, Any]:
        members = [[answers[key] for key in group] for group in groups]
        found = [ensemble_accuracy(group, labels) for group in members]
        return {
            "row": name,
            "accuracy": found,
            "mean": statistics.mean(found),
            "parameters": sum(parameters[label] for label, _ in groups[0]),
            "disagreement": statistics.mean(disagreement(group) for group in members),
        }

    seeds = range(SEEDS)
    rows = [
        row("one of rank 4", [[("small", s)] for s in seeds]),
        row("one of rank 12", [[("large", s)] for s in seeds]),
        row("three of rank 4", [[("small", s) for s in seeds]]),
        row("res-tuning alone", [[("res-tuning", s)] for s in seeds]),
        row(
            "linear, bypass and res-tuning",
            [[("linear", s), ("small", s), ("res-tuning", s)] for s in seeds],
        ),
    ]
    for each in rows:
        print(
            f"{each['row']:32s} {each['mean']:.2%}  {each['parameters']:,} parameters, members "
            f"disagree on {each['disagreement']:.2%}",
            flush=True,
        )
    report = {
        "command": f"python recipes/ensembles.py --epochs {args.epochs}",
        "backbone": "restuning-tiny",
        "data": "digits",
        "settings": protocol.settings.to_dict(),
        "versions": read_versions(),
        "hardware": describe_hardware(torch.device("cpu")),
        "rows": rows,
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
