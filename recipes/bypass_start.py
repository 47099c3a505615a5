"""Where the lambdas of a bypass start, and how fast they learn: at the linear probe, as before, or low in every layer.

    python recipes/bypass_start.py

ViT-Ti/16 with ImageNet weights at its own 224 px on the shared tasks, class tokens of all taps stored
once (bf16). Every method runs at its default epochs and rate, linear probing and the bypass also
at those of before, and the bypass at those of now with the start of before, and with lambdas at the common rate:
what the start and their rate alone are worth. Starts, epochs and rates were chosen on the validation images of seven of the tasks and of
digits; here all 1000 images are trained on, three seeds, and the test split is asked once. A
killed run goes on with the task it was at.

About two minutes a task on 1 CPU core that nothing else uses, and its features before that. Writes
`recipes/bypass_start.json` and the table in `docs/ablations.md` through `recipes/ablations/page.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

import timm
import torch

import restuning
from restuning import FitSettings, Host, Task, methods
from restuning._files import write_json
from restuning.data import load_data
from restuning.features import StoreOptions
from restuning.training.defaults import settings_for
from restuning.training.parallel_runs import evaluate_stored, train_in_parallel
from restuning.training.run import open_inputs

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("RESTUNING_DATA", ROOT.parent / "shared" / "data"))
WEIGHTS = DATA / "weights" / "vit_tiny_patch16_224.safetensors"
NAME = "timm:vit_tiny_patch16_224"
RESULT = Path(__file__).with_suffix(".json")
BEFORE = {
    "linear": FitSettings(epochs=100, lr=3e-2),
    "res-tuning-bypass": FitSettings(epochs=30, lr=1e-2),
}
"""Defaults of before, which were chosen on digits alone."""
COMMON = {"lambda_rate": 1.0}
ROWS: dict[str, tuple[str, bool, bool, dict[str, float]]] = {
    "linear, as before": ("linear", False, True, {}),
    "linear": ("linear", False, False, {}),
    "bypass, as before": ("res-tuning-bypass", True, True, {}),
    "bypass, start of before, lambdas at the common rate": (
        "res-tuning-bypass",
        True,
        False,
        COMMON,
    ),
    "bypass, lambdas at the common rate": ("res-tuning-bypass", False, False, COMMON),
    "bypass-horizontal": ("bypass-horizontal", False, False, {}),
    "bypass-vertical": ("bypass-vertical", False, False, {}),
    "bypass": ("res-tuning-bypass", False, False, {}),
}
"""Name of a row: its method, whether it starts as before, whether its settings are those of before, and others."""


def start_as_before(task: Task) -> None:
    """Lambda 0.5 in every layer and 0.95 in the last."""
    assert task.side is not None
    gate = task.side.get_parameter("gate")
    with torch.no_grad():
        gate.zero_()
        gate[-1] = math.log(0.95 / 0.05)


def run_row(row: str, seed: int, host: Host, fed: Any) -> dict[str, Any]:
    """Train once, test once."""
    method, old_start, old_settings, others = ROWS[row]
    torch.manual_seed(seed)
    task = methods.build(method, host, num_classes=len(fed.labels))
    if old_start:
        start_as_before(task)
    base = BEFORE[method] if old_settings else None
    settings = settings_for(method, {"seed": seed, **others}, base)
    trained = train_in_parallel(host, [task], [settings], fed.train, None)[0].task
    side = trained.side
    return {
        "row": row,
        "seed": seed,
        "epochs": settings.epochs,
        "lr": settings.lr,
        "lambda_rate": settings.lambda_rate,
        "test_accuracy": evaluate_stored(host, trained, fed.test),
        "lambda": None if side is None else side.get_parameter("gate").sigmoid().tolist(),
    }


def rows_of(name: str, seeds: int, work: Path, loaded: Any, host: Host) -> list[dict[str, Any]]:
    """All rows of a task; those of a task that was finished are read."""
    file = work / f"{name}.json"
    if file.exists():
        return json.loads(file.read_text())["rows"]
    data = load_data(str(DATA / "vtab" / name), loaded)
    inputs = open_inputs(host, loaded, data, StoreOptions(work / "features", precision="bf16"))
    probe = methods.build("res-tuning-bypass", host, num_classes=data.num_classes)
    stored = inputs.open_store(probe)
    assert stored is not None
    fed = stored.data(data, final=True)
    rows = [
        {"task": name, **run_row(row, seed, host, fed)} for row in ROWS for seed in range(seeds)
    ]
    write_json(file, {"rows": rows, "data": data.identity})
    for row in ROWS:
        found = [r["test_accuracy"] for r in rows if r["row"] == row]
        print(f"{name:18s} {row:24s} {statistics.mean(found):.2%}", flush=True)
    return rows


def main() -> None:
    """Every task, and the report."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--tasks", default="", help="with commas between; all of the folder")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("runs/bypass-start"))
    args = parser.parse_args()
    if not WEIGHTS.exists():
        print(f"skipped: needs {WEIGHTS} and folders in VTAB-1K list layout in {DATA / 'vtab'}")
        sys.exit(0)
    there = sorted(p.parent.name for p in DATA.glob("vtab/*/test.txt"))
    names = args.tasks.split(",") if args.tasks else there
    args.work.mkdir(parents=True, exist_ok=True)
    loaded = restuning.load_backbone(NAME, weights=WEIGHTS)
    host = Host(loaded.model, *loaded.example)
    rows = [r for name in names for r in rows_of(name, args.seeds, args.work, loaded, host)]
    asked = f" --tasks {args.tasks}" if args.tasks else ""
    report = {
        "command": f"python recipes/bypass_start.py{asked}",
        "backbone": NAME,
        "size": max(loaded.own_size or (0,)),
        "seeds": args.seeds,
        "versions": {
            "restuning": restuning.__version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
        },
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "rows": rows,
    }
    write_json(RESULT, report)


if __name__ == "__main__":
    main()
