"""How far probabilities are off, with a temperature from the validation split and without.

    python recipes/calibration.py

Tasks of 1000 images from `RESTUNING_DATA` on ViT-Ti at 112 px, smaller than the backbone's own size, from
stored features. Each method is trained
on the training split, and its temperature fitted to the validation split; then on both, as the final run of
`--method auto` is, with the same temperature. Test splits say what it is worth. `ridge` is given one as
well, to see whether it needs one, and 30 validation examples drawn ten times say what a small split does
with and without `doubt`. With `--auto TASKS` the whole of `--method auto` is tested as well. Writes
`recipes/calibration.json`; some half an hour on one CPU core.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import restuning
from restuning.backbones import Backbone
from restuning.bench.measure import describe_hardware, read_versions
from restuning.features import StoreOptions
from restuning.problems import to_probabilities
from restuning.training import calibration_error, fit_temperature
from restuning.training.defaults import settings_for
from restuning.training.evaluate import collect_logits
from restuning.training.run import Inputs, Recipe, Setup, open_inputs, with_pool

FILE = Path(__file__).with_suffix(".json")
FEW, DRAWS = 30, 10
SETTINGS = {
    "linear": {"epochs": 40, "lr": 5e-3},
    "res-tuning-bypass": {"epochs": 40, "lr": 5e-3},
    "ridge": {},
}
"""Rates and epochs of `recipes/shared_tasks`."""

Answers = tuple[Tensor, Tensor]


def answers(recipe: Recipe, inputs: Inputs, out: Path) -> tuple[Answers | None, Answers]:
    """Logits and labels of the validation split, None where it is trained on, and of the test split."""
    setup = Setup.open(inputs, recipe.build(inputs))
    setup.fit(recipe.settings, out, progress=False)
    data = setup.data

    def split(rows: Any) -> Answers:
        return collect_logits(setup.tuned, rows, 64, data.collate)

    return None if data.val is None else split(data.val), split(data.test)


def judged(test: Answers, temperature: float) -> dict[str, float]:
    """Calibration error and cross-entropy of answers at a temperature."""
    logits, labels = test
    confidence = to_probabilities(logits, temperature).amax(1)
    return {
        "temperature": temperature,
        "ece": calibration_error(confidence, logits.argmax(1) == labels),
        "nll": float(F.cross_entropy(logits / temperature, labels)),
    }


def few_examples(val: Answers, test: Answers) -> dict[str, list[float]]:
    """Cross-entropy of the test split with temperatures of a few validation examples."""
    draw, found = torch.Generator().manual_seed(0), {}
    for _ in range(DRAWS):
        rows = torch.randperm(len(val[1]), generator=draw)[:FEW]
        for doubt in (0.5, 0.0):
            fitted = fit_temperature(val[0][rows], val[1][rows], doubt=doubt)
            found.setdefault(f"doubt {doubt}", []).append(judged(test, fitted)["nll"])
    return found


def measure(backbone: Backbone, folder: Path, method: str, work: Path) -> dict[str, Any]:
    """One method on one task."""
    data = restuning.load_data(str(folder), backbone)
    inputs = open_inputs(backbone.host(), backbone, data, StoreOptions(work / "stores"))
    inputs = with_pool(inputs, {})
    recipe = Recipe(method, settings_for(method, SETTINGS[method]))
    at = work / folder.name / method
    val, test = answers(recipe, inputs, at / "held out")
    both = data.with_splits(train=torch.utils.data.ConcatDataset([data.train, data.val]), val=None)
    _, final = answers(recipe, replace(inputs, data=both, final=True), at / "both")
    assert val is not None
    fitted = fit_temperature(*val)
    return {
        "task": folder.name,
        "method": method,
        "validation examples": len(val[1]),
        "accuracy": float((test[0].argmax(1) == test[1]).float().mean()),
        "as it is": judged(test, 1.0),
        "fitted": judged(test, fitted),
        "on both, as it is": judged(final, 1.0),
        "on both, fitted before": judged(final, fitted),
        "few": few_examples(val, test),
    }


def measure_auto(backbone: Backbone, folder: Path, work: Path) -> dict[str, Any]:
    """What `--method auto` leaves, with its temperature and without."""
    at = work / folder.name / "auto"
    more = {"store": work / "stores", "epochs": 10, "precision": "bf16"}
    run = restuning.train(str(folder), backbone=backbone, method="auto", out=at, **more)
    told = restuning.evaluate_task(restuning.Predictor(backbone, {"it": run.task}), str(folder))
    return {"task": folder.name, "method": f"auto: {run.method}", **told}


def main() -> None:
    """Measure what is asked for, print rows, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", default="rsscn7,elpv,flowers12,cifar100,brain_mri")
    parser.add_argument("--auto", default="", help="tasks, with commas")
    args = parser.parse_args()
    torch.set_num_threads(1)
    shared = Path(os.environ["RESTUNING_DATA"])
    weights = shared / "weights/vit_tiny_patch16_224.safetensors"
    backbone = restuning.load_backbone("timm:vit_tiny_patch16_224@112", weights=weights)
    rows, chosen = [], []
    with tempfile.TemporaryDirectory() as work:
        for name in filter(None, args.tasks.split(",")):
            for method in SETTINGS:
                rows.append(measure(backbone, shared / "vtab" / name, method, Path(work)))
                print(rows[-1], flush=True)
        for name in filter(None, args.auto.split(",")):
            chosen.append(measure_auto(backbone, shared / "vtab" / name, Path(work)))
            print(chosen[-1], flush=True)
    ways = [key for key, value in rows[0].items() if isinstance(value, dict) and "ece" in value]
    means = {
        method: {
            way: {
                figure: statistics.mean(row[way][figure] for row in rows if row["method"] == method)
                for figure in ("ece", "nll")
            }
            for way in ways
        }
        for method in SETTINGS
    }
    few = {
        doubt: {
            "mean": statistics.mean(value for row in rows for value in row["few"][doubt]),
            "worst": max(value for row in rows for value in row["few"][doubt]),
        }
        for doubt in rows[0]["few"]
    }
    print(json.dumps({"means": means, "few": few}, indent=1))
    found = {
        "command": f"python recipes/calibration.py --tasks {args.tasks}"
        + (f" --auto {args.auto}" if args.auto else ""),
        "backbone": backbone.name,
        "settings": SETTINGS,
        "versions": read_versions(),
        "hardware": describe_hardware(torch.device("cpu")),
        "means": means,
        f"nll with {FEW} validation examples": few,
        "rows": rows,
        "auto": chosen,
    }
    FILE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
