"""Experiment (c): the bypass with horizontal tuners, vertical tuners, and both.

    python recipes/paper/bypass.py --seeds 3

Paper, Tables 3 and 6: both together are best, at the memory of inference, and many tasks cost one
forward. Here, ViT-Ti/16 at 112 px on all shared tasks: accuracy of linear probing and of the three
bypasses, trained from features stored once (30 epochs; the learning rate of each method and task is
chosen on its 200 validation images, then trained on all 1000); memory of a live training step of
64 images, every method in a process of its own; and the time in which all tasks answer the same
eight images, against Res-Tuning's. About 15 minutes on 1 CPU core.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from common import DATA, SIZE, backbone, into_docs, require_data, table, task_data, tasks, write

import restuning
from restuning.data import load_data
from restuning.features import StoreOptions
from restuning.search.sweep import sweep
from restuning.training import FitSettings, PeakMemory
from restuning.training.run import open_inputs

METHODS = ["linear", "bypass-horizontal", "bypass-vertical", "res-tuning-bypass"]
RATES = [3e-3, 1e-2, 3e-2]
"""Around the command line's defaults for these methods, a factor of three apart."""
EPOCHS, BATCH, TOGETHER = 30, 64, 8
MEMORY = ["forward", *METHODS, "res-tuning"]
GIVE_BACK = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
}
"""glibc gives freed memory back: peaks then repeat to a megabyte."""


def accuracies(seeds: int, work: Path) -> list[dict[str, Any]]:
    """A row a task, method and seed. Finished arms are not run again."""
    loaded, host = backbone()
    rows = []
    for name in tasks():
        data = load_data(str(DATA / "vtab" / name), loaded)
        probe = restuning.methods.build("res-tuning-bypass", host, num_classes=data.num_classes)
        inputs = open_inputs(host, loaded, data, StoreOptions(work / "features"))
        inputs.open_store(probe)
        for method in METHODS:
            report = sweep(
                inputs,
                method,
                {"lr": RATES},
                seeds=range(seeds),
                settings=FitSettings(epochs=EPOCHS),
                out=work / "bypass" / f"{name}.{method}",
            )
            rows += [
                {
                    "experiment": "bypass",
                    "task": name,
                    "method": method,
                    "seed": seed,
                    "test_accuracy": accuracy,
                    "lr": report["best"]["setting"]["lr"],
                    "val_accuracy": report["best"]["mean"],
                    "trainable_parameters": report["best"]["trainable_parameters"],
                }
                for seed, accuracy in enumerate(report["final"]["test_accuracy"])
            ]
            mean = statistics.mean(report["final"]["test_accuracy"])
            print(f"{name:18s} {method:20s} {mean:.2%}", flush=True)
    return rows


def step_memory(method: str) -> int:
    """Peak bytes above the weights of one training step, in this process."""
    _, host = backbone()
    x, y = torch.randn(BATCH, 3, SIZE, SIZE), torch.randint(10, (BATCH,))
    if method == "forward":

        def step() -> None:
            with torch.no_grad():
                host.model(x)
    else:
        torch.manual_seed(0)
        task = restuning.methods.build(method, host, num_classes=10)
        tuned = restuning.Tuned(host, task).train()
        optimiser = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad])

        def step() -> None:
            F.cross_entropy(tuned(x), y).backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    step()
    peak = PeakMemory("cpu")
    step()
    return peak.read() or 0


def memory(threads: int) -> dict[str, int]:
    """Peak bytes by method."""
    found = {}
    for method in MEMORY:
        done = subprocess.run(
            [sys.executable, __file__, "--one", method, "--threads", str(threads)],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **GIVE_BACK},
        )
        found[method] = json.loads(done.stdout)
    return found


def inference(rounds: int = 15) -> dict[str, dict[str, float]]:
    """Seconds in which all tasks answer the same images, and one bare forward; taken in turns."""
    loaded, host = backbone()
    classes = {name: task_data(name, loaded).num_classes for name in tasks()}
    x = torch.randn(TOGETHER, 3, SIZE, SIZE)

    def all_tasks(method: str) -> restuning.MultiTask:
        return restuning.MultiTask(
            host,
            {
                name: restuning.methods.build(method, host, num_classes=count)
                for name, count in classes.items()
            },
        )

    modules = {"forward": host.model}
    modules |= {method: all_tasks(method) for method in ("res-tuning-bypass", "res-tuning")}
    times: dict[str, list[float]] = {name: [] for name in modules}
    with torch.inference_mode():
        for turn in range(rounds + 2):
            for name, module in modules.items():
                start = time.perf_counter()
                module(x)
                if turn >= 2:
                    times[name].append(time.perf_counter() - start)
    return {
        name: {"median": statistics.median(t), "min": min(t), "max": max(t)}
        for name, t in times.items()
    }


def tables(rows: list[dict[str, Any]], peaks: dict[str, int], times: dict[str, Any]) -> str:
    """The three tables of the docs."""
    lines = [
        table(rows, METHODS),
        "",
        f"One training step of {BATCH} images, live, fp32:",
        "",
        "| method | peak above weights | over a forward |",
        "|---|---:|---:|",
    ]
    lines += [
        f"| `{name}` | {peak / 2**20:.0f} MiB | {peak / peaks['forward']:.2f} x |"
        for name, peak in peaks.items()
    ]
    count = len({row["task"] for row in rows})
    lines += [
        "",
        f"All {count} tasks answer the same {TOGETHER} images (medians of turns):",
        "",
        "| | time | over a forward |",
        "|---|---:|---:|",
    ]
    base = times["forward"]["median"]
    names = {
        "forward": "one forward, no task",
        "res-tuning-bypass": "`res-tuning-bypass`",
        "res-tuning": "`res-tuning`",
    }
    lines += [
        f"| {names[name]} | {1000 * t['median']:.0f} ms | {t['median'] / base:.2f} x |"
        for name, t in times.items()
    ]
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, then write the JSON and the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/paper"))
    parser.add_argument("--one", choices=MEMORY, help="print the memory of one method's step")
    args = parser.parse_args()
    require_data()
    torch.set_num_threads(args.threads)
    if args.one:
        print(step_memory(args.one))
        return
    peaks, times = memory(args.threads), inference()
    rows = accuracies(args.seeds, args.work)
    command = f"python recipes/paper/bypass.py --seeds {args.seeds}"
    write("bypass", command, rows, step_peak_bytes=peaks, inference_seconds=times)
    into_docs("bypass", tables(rows, peaks, times))


if __name__ == "__main__":
    main()
