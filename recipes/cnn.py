"""A convolutional network: the pooled bypass against linear probing, on real weights.

    python recipes/cnn.py

Backbone: MobileNetV2 at width 0.35 with ImageNet weights (`weights/mobilenetv2_035.safetensors` in
`$RESTUNING_DATA`; 1.7 million parameters), at 112 px, a quarter of the cost of their 224
(smaller than the backbone's own size; being redrawn at it). Tasks: the shared ones with at most 500 test images, 1000 training images each, in VTAB-1K lists. Both methods
train from features stored once and have four settings: linear probing four learning rates, the bypass
two and two forms, plain and residual (adds what its tuners change to the backbone's own feature). The
committed figures are from when the plain form started near linear probing, lambda_L = 0.95. Chosen by the mean of three seeds on the 200 validation images, then trained on all 1000 and
tested once. A killed run goes on where it was.

About 5 minutes of one CPU core; writes `recipes/cnn.json` and the table in `docs/backbones.md`
through `docs/draw_backbones.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

import timm
import torch

import restuning
from restuning import FitSettings, Host, methods
from restuning.data import load_data
from restuning.features import StoreOptions
from restuning.search.sweep import sweep
from restuning.training.run import open_inputs

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("RESTUNING_DATA", ROOT.parent / "shared" / "data"))
WEIGHTS = DATA / "weights" / "mobilenetv2_035.safetensors"
NAME = "timm:mobilenetv2_035@112:pad_type=same,bn_eps=1e-3"
MOST_TESTED = 500
EPOCHS = 20
GRIDS: dict[str, dict[str, list[Any]]] = {
    "linear": {"lr": [1e-2, 3e-2, 1e-1, 3e-1]},
    "res-tuning-bypass": {"lr": [3e-3, 1e-2], "residual": [False, True]},
}


def tasks() -> list[str]:
    """Names of the tasks whose test split is small enough."""
    counts = {
        p.parent.name: len(p.read_text().splitlines()) for p in sorted(DATA.glob("vtab/*/test.txt"))
    }
    return [name for name, count in counts.items() if count <= MOST_TESTED]


def rows_of(name: str, seeds: int, work: Path, loaded: Any, host: Host) -> list[dict[str, Any]]:
    """A row a method and seed."""
    data = load_data(str(DATA / "vtab" / name), loaded)
    inputs = open_inputs(host, loaded, data, StoreOptions(work / "features"))
    # The widest first: all methods then share its store.
    inputs.open_store(methods.build("res-tuning-bypass", host, num_classes=data.num_classes))
    rows = []
    for method, grid in GRIDS.items():
        report = sweep(
            inputs,
            method,
            grid,
            seeds=range(seeds),
            settings=FitSettings(epochs=EPOCHS),
            out=work / f"{name}.{method}",
        )
        best, tested = report["best"], report["final"]["test_accuracy"]
        rows += [
            {
                "task": name,
                "method": method,
                "seed": seed,
                "test_accuracy": accuracy,
                "val_accuracy": best["val_accuracy"][seed],
                "chosen": best["setting"],
                "trainable_parameters": best["trainable_parameters"],
                "data": data.identity,
            }
            for seed, accuracy in enumerate(tested)
        ]
        print(
            f"{name:14s} {method:18s} val {best['mean']:.2%} test {statistics.mean(tested):.2%} "
            f"{best['setting']}",
            flush=True,
        )
    return rows


def main() -> None:
    """Every task, and the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("runs/cnn-recipe"))
    args = parser.parse_args()
    if not WEIGHTS.exists():
        print(f"skipped: needs {WEIGHTS} and folders in VTAB-1K list layout in {DATA / 'vtab'}")
        sys.exit(0)
    loaded = restuning.load_backbone(NAME, weights=WEIGHTS)
    host = Host(loaded.model, *loaded.example)
    rows = [r for name in tasks() for r in rows_of(name, args.seeds, args.work, loaded, host)]
    report = {
        "command": "python recipes/cnn.py",
        "backbone": NAME,
        "seeds": args.seeds,
        "epochs": EPOCHS,
        "grids": GRIDS,
        "chosen_on": "mean validation accuracy of the seeds",
        "versions": {
            "restuning": restuning.__version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
        },
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "rows": rows,
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
