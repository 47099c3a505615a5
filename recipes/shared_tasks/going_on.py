"""How a final run should go on from the weights of a trial: the measurement behind `auto`.

    python recipes/shared_tasks/going_on.py --tasks cifar100,caltech101

Res-Tuning is trained on four fifths of the training split, as a trial is; then on all of it from those
weights, multiplied by a factor, for fewer epochs; and once anew. Judged on the validation split, which
no run trains on; no test split is read. Writes `going_on.json` beside this file; some 6 minutes a task
on one core. A task that is there is not made again. ViT-Ti runs at 112 px here, which is smaller than the backbone's
own size; the figures are being redrawn at 224 px.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from restuning import methods
from restuning.bench import Bench, GridProtocol, find_tasks
from restuning.bench.measure import describe_hardware, read_versions
from restuning.data import Data
from restuning.data.decoded import DecodedImages
from restuning.task import Tuned
from restuning.training import FitSettings, fit
from restuning.training.calibrate import calibrated_loss
from restuning.training.evaluate import collect_logits

FILE = Path(__file__).with_suffix(".json")
METHOD, SEEN = "res-tuning", 0.8
WAYS = [
    {"shrink": 0.25, "epochs": 4, "rate": 1.0},
    {"shrink": 0.5, "epochs": 4, "rate": 1.0},
    {"shrink": 1.0, "epochs": 4, "rate": 0.4},
]
"""Factor of the weights; epochs; highest rate over that of the trial."""


def judged(
    bench: Bench,
    data: Data,
    train: DecodedImages,
    settings: FitSettings,
    out: Path,
    start: dict[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Train, and judge on validation; the weights and the figures."""
    torch.manual_seed(settings.seed)
    task = methods.build(METHOD, bench.host, num_classes=data.num_classes)
    if start is not None:
        task.load_state_dict(start)
    tuned = Tuned(bench.host, task)
    result = fit(tuned, train, settings=settings, out=out, collate=data.collate, progress=False)
    logits, labels = collect_logits(tuned, data.val, settings.batch_size, data.collate)
    figures = {
        "accuracy": float((logits.argmax(1) == labels).float().mean()),
        "cross_entropy": calibrated_loss(logits, labels),
        "steps": result.steps,
    }
    return {name: value.clone() for name, value in task.state_dict().items()}, figures


def measure(bench: Bench, name: str, suite: Path, seed: int, work: Path) -> dict[str, Any]:
    """All ways on one task."""
    (task,) = find_tasks(str(suite), [name])
    data = bench.data(task).apart
    settings = bench.protocol.settings_for((), seed)
    whole: DecodedImages = data.train
    drawn = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed + 1))
    at = drawn[: int(SEEN * len(whole))].tolist()
    part = DecodedImages(whole.pixels[at], whole.labels[at], whole.normalise)
    weights, trial = judged(bench, data, part, settings, work / "trial")
    rows = []
    for number, way in enumerate(WAYS):
        start = {n: v * way["shrink"] if v.is_floating_point() else v for n, v in weights.items()}
        own = replace(settings, epochs=way["epochs"], lr=settings.lr * way["rate"])
        _, found = judged(bench, data, whole, own, work / f"way-{number}", start)
        rows.append({**way, **found})
        print(name, rows[-1], flush=True)
    _, anew = judged(bench, data, whole, settings, work / "anew")
    return {
        "trial": trial,
        "went_on": rows,
        "anew": anew,
        "seed": seed,
        "images": [len(part), len(whole), len(data.val)],
    }


def main() -> None:
    """Every task, and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", default="cifar100,caltech101")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    shared = Path(os.environ["RESTUNING_DATA"])
    protocol = GridProtocol(
        "timm:vit_tiny_patch16_224@112",
        str(shared / "weights/vit_tiny_patch16_224.safetensors"),
        FitSettings(epochs=10, lr=5e-3, precision="bf16"),
    )
    found = json.loads(FILE.read_text()) if FILE.exists() else {"tasks": {}}
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(protocol, Path(work))
        for name in args.tasks.split(","):
            if name not in found["tasks"]:
                found["tasks"][name] = measure(
                    bench, name, shared / "vtab", args.seed, Path(work) / name
                )
                found |= {
                    "command": f"python recipes/shared_tasks/going_on.py --tasks {args.tasks}",
                    "method": METHOD,
                    "backbone": protocol.backbone,
                    "settings": protocol.settings.to_dict(),
                    "versions": read_versions(),
                    "hardware": describe_hardware(torch.device("cpu")),
                }
                FILE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
