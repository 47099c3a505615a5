"""What `train`, `eval` and `predict` do."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from restuning import methods
from restuning._errors import DataError
from restuning._version import __version__
from restuning.backbones import Backbone, Preprocessing, load_backbone
from restuning.cli.inspect import proofs
from restuning.cli.report import comparison, show
from restuning.data import Data, decode, load_data
from restuning.files import describe, load, save
from restuning.host import Host
from restuning.train import FitSettings, evaluate, fit
from restuning.tuned import Tuned

COMPARED = ("linear", "res-tuning", "res-tuning-bypass")


@dataclass(frozen=True)
class Default:
    """Settings of a method where the user gives none, chosen on the validation split of digits."""

    epochs: int
    lr: float


OTHERWISE = Default(15, 2e-3)
DEFAULTS = {
    "linear": Default(20, 1e-2),
    "res-tuning-bypass": Default(30, 5e-3),
    "bypass-horizontal": Default(30, 5e-3),
    "bypass-vertical": Default(30, 5e-3),
    "full": Default(20, 2e-4),
}


def train(
    name: str,
    chosen: Sequence[str],
    settings: Callable[[str], FitSettings],
    *,
    backbone: str,
    weights: Path | None,
    random: bool,
    out: Path | None,
    options: dict[str, Any],
    augment: str,
    final: bool,
    skip_bad: bool,
    text: str,
    label: str,
    resume: bool,
    console: Console,
) -> list[dict[str, Any]]:
    """Train one method or compare several; returns one row a method."""
    for method in chosen:
        settings(method)
    first = settings(chosen[0])
    torch.manual_seed(first.seed)
    loaded = load_backbone(backbone, weights=weights, random=random)
    data = load_data(
        name, loaded, augment=augment, skip_bad=skip_bad, final=final, text=text, label=label
    )
    host = Host(loaded.model, *loaded.example, **loaded.kwargs)
    if torch.cuda.is_available():
        host.cuda()
    rule = host.readout_rule
    console.print(
        f"[bold]backbone[/bold]  {backbone}: {type(loaded.model).__name__}, "
        f"{host.sites.layers} layers, weights {loaded.weights}\n"
        f"[bold]sites[/bold]     {proofs(host)}\n"
        f"[bold]readout[/bold]   {rule.pool} after {rule.norm or 'no norm'}, width {rule.dim} "
        f"({rule.proof})\n[bold]data[/bold]      {data.describe()}"
    )
    single = len(chosen) == 1
    stamp = time.strftime("%Y%m%d-%H%M%S")
    kind = _folder(chosen[0]) if single else "comparison"
    folder = out or Path("runs") / f"{data.name}-{kind}-{stamp}"
    rows = []
    for method in chosen:
        to = folder if single else folder / _folder(method)
        row = _train_one(
            method, host, data, loaded, settings(method), to, dict(options), resume, console
        )
        rows.append(row)
    if not single:
        comparison(rows, folder, f"{data.name} on {backbone}")
    show(rows, console)
    console.print(f"left in [bold]{folder}[/bold]")
    return rows


def _folder(method: str) -> str:
    return method.replace("[", "-").replace("]", "").replace(",", "-").replace("=", "-")


def _train_one(
    method: str, host: Host, data: Data, backbone: Backbone, settings: FitSettings, out: Path,
    options: dict[str, Any], resume: bool, console: Console,
) -> dict[str, Any]:  # fmt: skip
    torch.manual_seed(settings.seed)
    if method == "adaptformer":
        options.pop("rank", None)
    task = methods.build(method, host, num_classes=data.num_classes, **options)
    task.labels = data.labels
    device = next(host.model.parameters()).device
    tuned = Tuned(host, task.to(device))
    console.print(
        f"\n[bold]{method}[/bold]  {task.trainable_parameters():,} trainable parameters, "
        f"{task.tuner_parameters():,} without the head; {settings.epochs} epochs, lr {settings.lr}"
    )
    result = fit(
        tuned, data.train, data.val, settings=settings, out=out, collate=data.collate,
        resume=resume,
    )  # fmt: skip
    tested = (
        evaluate(tuned, data.test, settings.batch_size, data.collate)
        if data.test is not None else {"accuracy": None}
    )  # fmt: skip
    row = {
        "method": method,
        "test_accuracy": tested["accuracy"],
        "trainable_parameters": task.trainable_parameters(),
        "tuner_parameters": task.tuner_parameters(),
        "peak_memory_bytes": result.peak_memory_bytes,
        "seconds": result.seconds,
        "seed": settings.seed,
    }
    more = {
        **row,
        "val_accuracy": result.val_accuracy,
        "train_loss": result.train_loss,
        "steps": result.steps,
        "memory_measure": result.memory_measure,
        "backbone": backbone.name,
        "weights": backbone.weights,
        "fingerprint": host.fingerprint(),
        "data": {"name": data.name, "identity": data.identity, "skipped": data.skipped},
        "settings": settings.to_dict(),
        "options": options,
        "versions": {"restuning": __version__, "torch": torch.__version__},
        "hardware": {
            "device": str(device),
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
        },
    }
    save(
        task, host, out / f"{data.name}.task", backbone=backbone.name,
        preprocessing=backbone.preprocessing.to_dict() if backbone.preprocessing else None,
        results={"test accuracy": tested["accuracy"], "seed": settings.seed},
    )  # fmt: skip
    (out / "metrics.json").write_text(json.dumps(more, indent=1) + "\n", encoding="utf-8")
    (out / "settings.json").write_text(
        json.dumps({"method": method, "options": options, **settings.to_dict()}, indent=1) + "\n",
        encoding="utf-8",
    )
    return row


def _tuned(
    task: Path, backbone: str | None, weights: Path | None, random: bool
) -> tuple[Tuned, Backbone, dict[str, Any]]:
    description = describe(task)
    name = backbone or description["backbone"]["name"]
    loaded = load_backbone(name, weights=weights, random=random)
    host = Host(loaded.model, *loaded.example, **loaded.kwargs)
    return Tuned(host, load(task, host)).eval(), loaded, description


def evaluate_task(
    task: Path, data: str, *, backbone: str | None, weights: Path | None, random: bool,
    batch_size: int, skip_bad: bool, text: str, label: str,
) -> dict[str, Any]:  # fmt: skip
    """Accuracy, loss and count on the test split."""
    tuned, loaded, description = _tuned(task, backbone, weights, random)
    loaded_data = load_data(data, loaded, skip_bad=skip_bad, text=text, label=label)
    if loaded_data.test is None:
        raise DataError("there is no test split", where=data, fix="give a data set with one")
    trained = description["task"]["labels"]
    if trained and trained != loaded_data.labels:
        raise DataError(
            "the classes of the data are not those of the task", where=data,
            found=f"{loaded_data.num_classes} classes {loaded_data.labels[:4]}; the task has "
            f"{len(trained)}: {trained[:4]}", fix="evaluate on the data it was trained for",
        )  # fmt: skip
    result = evaluate(tuned, loaded_data.test, batch_size, loaded_data.collate)
    return {"task": str(task), "data": loaded_data.name, "method": description["task"]["method"],
            **result}  # fmt: skip


def predict(
    images: Sequence[Path], task: Path, *, backbone: str | None, weights: Path | None,
    random: bool, top: int, batch_size: int, skip_bad: bool,
) -> tuple[list[dict[str, Any]], int]:  # fmt: skip
    """Predictions of every image, and how many files were skipped."""
    tuned, loaded, description = _tuned(task, backbone, weights, random)
    if loaded.preprocessing is None:
        raise DataError("predict takes images", where=str(task), fix="give an image task")
    stored = description["preprocessing"]
    preprocessing = Preprocessing.from_dict(stored) if stored else loaded.preprocessing
    files: list[Path] = []
    for path in images:
        files += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    labels = description["task"]["labels"]
    results: list[dict[str, Any]] = []
    skipped = 0
    for start in range(0, len(files), batch_size):
        names, tensors = [], []
        for file in files[start : start + batch_size]:
            try:
                tensors.append(preprocessing.image(decode(file)))
                names.append(file)
            except DataError:
                if not skip_bad:
                    raise
                skipped += 1
        if not tensors:
            continue
        with torch.inference_mode():
            chances = tuned(torch.stack(tensors)).softmax(-1)
        best = chances.topk(min(top, chances.shape[-1]))
        for name, values, indices in zip(names, best.values, best.indices, strict=True):
            results.append(
                {
                    "image": str(name),
                    "predictions": [
                        {"label": labels[i] if labels else str(i), "probability": p}
                        for p, i in zip(values.tolist(), indices.tolist(), strict=True)
                    ],
                }
            )
    return results, skipped
