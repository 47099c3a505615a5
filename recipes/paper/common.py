"""What the paper recipes share: the shared tasks and weights, and one resumable run.

A run is a method, a task and a seed. Its result is one JSON file, written whole or not at all;
a run whose file is there is not run again, and a killed one goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import timm
import torch

import restuning
from restuning.backbones import Backbone, load_backbone
from restuning.data import Data, load_data
from restuning.training import FitSettings, evaluate

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("RESTUNING_DATA", ROOT.parent / "shared" / "data"))
WEIGHTS = DATA / "weights" / "vit_tiny_patch16_224.safetensors"
RESULTS = Path(__file__).parent / "results"
SIZE = 112
"""Pixels. A step costs a quarter of one at 224; but it is smaller than the backbone's own size, and the figures
are being redrawn at that."""
EPOCHS, LEARNING_RATE = 10, 2e-3
"""The lower of two rates that end alike on the validation split of caltech101 (`start.py`), for every
method and task; epochs by what a laptop can run. Nothing else was chosen on these tasks."""


def require_data() -> None:
    """End with a message where the shared data are absent."""
    if not WEIGHTS.exists():
        print(
            f"skipped: no weights and tasks in {DATA}. This recipe needs a ViT-Ti "
            "(weights/vit_tiny_patch16_224.safetensors) and folders in VTAB-1K list layout "
            "(vtab/TASK/train800val200.txt, test.txt, images/); set RESTUNING_DATA to their place."
        )
        sys.exit(0)


def tasks() -> list[str]:
    """Names of the tasks in the folder."""
    return sorted(p.name for p in (DATA / "vtab").iterdir() if (p / "test.txt").exists())


def backbone(size: int = SIZE) -> tuple[Backbone, restuning.Host]:
    """The ViT-Ti with its AugReg weights, at `size` pixels."""
    loaded = load_backbone(f"timm:vit_tiny_patch16_224@{size}", weights=WEIGHTS)
    return loaded, restuning.Host(loaded.model, *loaded.example)


def task_data(name: str, loaded: Backbone) -> Data:
    """All 1000 training images; the test split."""
    return load_data(str(DATA / "vtab" / name), loaded, final=True)


def run(
    experiment: str,
    method: str,
    host: restuning.Host,
    data: Data,
    seed: int,
    work: Path,
    epochs: int = EPOCHS,
    lr: float = LEARNING_RATE,
    **options: Any,
) -> dict[str, Any]:
    """Train on the 1000 images, test the last checkpoint once."""
    name = method.replace("[", "-").replace("]", "").replace("=", "-").replace(",", "-")
    folder = work / experiment / f"{data.name}.{name}.{seed}"
    file = folder / "result.json"
    if file.exists():
        return json.loads(file.read_text())
    torch.manual_seed(seed)
    task = restuning.methods.build(method, host, num_classes=data.num_classes, **options)
    tuned = restuning.Tuned(host, task)
    settings = FitSettings(epochs=epochs, lr=lr, seed=seed, precision="bf16")
    fitted = restuning.fit(tuned, data.train, settings=settings, out=folder)
    tested = evaluate(tuned, data.test)
    result = {
        "experiment": experiment,
        "task": data.name,
        "method": method,
        "seed": seed,
        "test_accuracy": tested["accuracy"],
        "train_loss": fitted.train_loss,
        "tuner_parameters": task.tuner_parameters(),
        "trainable_parameters": task.trainable_parameters(),
        "peak_memory_bytes": fitted.peak_memory_bytes,
        "seconds": fitted.seconds,
        "threads": torch.get_num_threads(),
        "settings": settings.to_dict(),
        "options": options,
        "data": data.identity,
    }
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(file)
    print(f"{data.name:18s} {method:36s} seed {seed}  {tested['accuracy']:.2%}", flush=True)
    return result


def write(name: str, command: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """Write the committed JSON: rows, versions, hardware, command."""
    RESULTS.mkdir(exist_ok=True)
    report = {
        "command": command,
        "backbone": "vit_tiny_patch16_224, AugReg ImageNet-21k to 1k",
        "versions": {
            "restuning": restuning.__version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
        },
        "hardware": f"{platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads",
        **more,
        "rows": rows,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")


def mean_and_std(values: Iterable[float]) -> str:
    """In per cent, with the number of seeds."""
    values = [100 * v for v in values]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread} ({len(values)})"


def table(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """Markdown: a row a task, a column a method, test accuracy over seeds, and their mean."""
    lines = [
        "| task | " + " | ".join(f"`{c}`" for c in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    names = list(dict.fromkeys(row["task"] for row in rows))
    for name in names:
        cells = []
        for column in columns:
            found = [
                r["test_accuracy"] for r in rows if r["task"] == name and r["method"] == column
            ]
            cells.append(mean_and_std(found) if found else "-")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if len(names) > 1:
        means = []
        for column in columns:
            seeds = sorted({r["seed"] for r in rows if r["method"] == column})
            whole = [
                statistics.mean(v)
                for s in seeds
                if len(
                    v := [
                        r["test_accuracy"] for r in rows if r["method"] == column and r["seed"] == s
                    ]
                )
                == len(names)
            ]
            means.append(mean_and_std(whole) if whole else "-")
        lines.append("| **mean** | " + " | ".join(means) + " |")
    return "\n".join(lines)


def into_docs(section: str, text: str) -> None:
    """Replace a section of docs/paper_recipes.md, between its two marks."""
    page = ROOT / "docs" / "paper_recipes.md"
    start, end = f"<!-- {section} -->", f"<!-- /{section} -->"
    whole = page.read_text()
    before, _, rest = whole.partition(start)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{start}\n{text}\n{end}{after}")
