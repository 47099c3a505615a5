"""Where tuners start: as no change, or at random as in the authors' code, on caltech101.

    python recipes/paper/start.py

ViT-Ti/16 at 112 px, dual Res-Adapter, 800 training images, validation accuracy after each of six
epochs, at two learning rates. This is why the named methods start as no change. About 2 minutes a
run on 1 CPU core.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import DATA, backbone, into_docs, require_data, write

import restuning
from restuning.data import load_data
from restuning.training import FitSettings


def main() -> None:
    """Four runs, the JSON and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/paper/start"))
    args = parser.parse_args()
    require_data()
    torch.set_num_threads(args.threads)
    loaded, host = backbone()
    data = load_data(str(DATA / "vtab" / "caltech101"), loaded)
    rows = []
    for zero in (True, False):
        for lr in (2e-3, 5e-3):
            torch.manual_seed(0)
            task = restuning.methods.build(
                "res-tuning", host, num_classes=data.num_classes, zero=zero
            )
            settings = FitSettings(epochs=6, lr=lr, precision="bf16")
            out = args.work / f"{'zero' if zero else 'random'}-{lr}"
            tuned = restuning.Tuned(host, task)
            result = restuning.fit(tuned, data.train, data.val, settings=settings, out=out)
            accuracy = [epoch["val_accuracy"] for epoch in result.history]
            rows.append({"zero": zero, "lr": lr, "val_accuracy": accuracy, "seed": 0})
            print(rows[-1], flush=True)
    write("start", "python recipes/paper/start.py", rows)
    lines = ["| start | lr | validation accuracy after epochs 1 to 6 |", "|---|---:|---|"]
    lines += [
        f"| {'no change' if r['zero'] else 'random'} | {r['lr']} | "
        + ", ".join(f"{100 * v:.1f}" for v in r["val_accuracy"])
        + " |"
        for r in rows
    ]
    into_docs("start", "\n".join(lines))


if __name__ == "__main__":
    main()
