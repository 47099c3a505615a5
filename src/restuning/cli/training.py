"""What `train` does."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from restuning import methods
from restuning._version import __version__
from restuning.backbones import Backbone, load_backbone, with_text_tower
from restuning.cli.inspect import proofs
from restuning.cli.report import comparison, show
from restuning.cli.zero_shot import ZeroShot
from restuning.data import LONGEST_TEXT, Data, load_data
from restuning.features import Cached, default_root
from restuning.features.stored import (
    BY_ITSELF,
    VIEWS_OF,
    Stored,
    open_or_build,
    reason_not_storable,
)
from restuning.forecast import Run, forecast_run
from restuning.host import Extractor
from restuning.task import Task, Tuned, save
from restuning.training import FitSettings, evaluate, fit
from restuning.training.closed_form import solve_closed_form

COMPARED = ("linear", "res-tuning", "res-tuning-bypass")


@dataclass(frozen=True)
class Default:
    """Settings of a method where the user gives none, chosen on the validation split of digits."""

    epochs: int
    lr: float


OTHERWISE = Default(15, 5e-3)
DEFAULTS = {
    "linear": Default(100, 3e-2),
    "res-tuning-bypass": Default(30, 1e-2),
    "bypass-horizontal": Default(30, 1e-2),
    "bypass-vertical": Default(30, 1e-2),
    "mixing-bypass": Default(30, 5e-3),
    "ridge": Default(5, 1e-3),
    "full": Default(20, 2e-4),
}


@dataclass(frozen=True)
class Source:
    """Where training data come from.

    Attributes:
        name: As the user wrote it.
        augment: Of training images.
        final: Train on train and val.
        skip_bad: Leave corrupt images out.
        text, label: Columns of a csv.
        cache: Train from stored features where that is exact.
        root: Where stores lie.
        dtype: How stored values are kept.
        precision: What the backbone computes stored values in.
        max_tokens: Tokens of a text that are read.
    """

    name: str
    augment: str = "none"
    final: bool = False
    skip_bad: bool = False
    text: str = "text"
    label: str = "label"
    cache: bool = True
    root: Path | None = None
    dtype: str = "fp32"
    precision: str = "fp32"
    max_tokens: int = LONGEST_TEXT

    def load(self, backbone: Backbone, *, plain: bool = False) -> Data:
        """The data set; `plain` without augmentation and with its splits apart."""
        return load_data(
            self.name,
            backbone,
            augment="none" if plain else self.augment,
            skip_bad=self.skip_bad,
            final=False if plain else self.final,
            text=self.text,
            label=self.label,
            max_tokens=self.max_tokens,
        )

    def features(
        self,
        task: Task,
        host: Extractor,
        backbone: Backbone,
        workers: int,
        say: Callable[[str], None],
    ) -> Stored | None:
        """Stored features, where training from them is exact; None for live training."""
        reason = "--no-cache" if not self.cache else reason_not_storable(task, self.augment)
        if reason:
            return None
        return open_or_build(
            host,
            backbone,
            self.load(backbone, plain=True),
            task.needs(host.readout_rule),
            root=self.root or default_root(),
            views=VIEWS_OF[self.augment],
            dtype=self.dtype,
            precision=self.precision,
            workers=workers,
            limit=BY_ITSELF,
            say=say,
        )


def train(
    source: Source,
    chosen: Sequence[str],
    settings: Callable[[str], FitSettings],
    *,
    backbone: str,
    weights: Path | None,
    random: bool,
    out: Path | None,
    options: dict[str, Any],
    resume: bool,
    console: Console,
    zero_shot: ZeroShot | None = None,
) -> list[dict[str, Any]]:
    """Train one method or compare several; returns one row a method."""
    for method in chosen:
        settings(method)
    torch.manual_seed(settings(chosen[0]).seed)
    if zero_shot is not None:
        backbone = with_text_tower(backbone)
    loaded = load_backbone(backbone, weights=weights, random=random)
    data = source.load(loaded)
    head = None if zero_shot is None else zero_shot.head(loaded, data.labels)
    host, options = opened(loaded, data, options, console)
    single = len(chosen) == 1
    folder = out or default_folder(data, folder_name(chosen[0]) if single else "comparison")
    rows = []
    for method in chosen:
        to = folder if single else folder / folder_name(method)
        rows.append(
            train_one(
                method,
                host,
                source,
                data,
                loaded,
                settings(method),
                to,
                dict(options),
                resume,
                console,
                head,
            )
        )
    if not single:
        comparison(rows, folder, f"{data.name} on {backbone}")
    show(rows, console)
    console.print(f"left in [bold]{folder}[/bold]")
    return rows


def opened(
    loaded: Backbone, data: Data, options: dict[str, Any], console: Console
) -> tuple[Extractor, dict[str, Any]]:
    """The host, on its device, and the options with the readout; prints what will be trained on."""
    host = loaded.host()
    if torch.cuda.is_available():
        host.cuda()
    rule = host.readout_rule
    # Every word of a tagged text is answered; else its one vector is what the authors make of it.
    pool = options.get("pool") or ("all" if data.kind == "tags" else loaded.pool)
    options = {**options, "pool": pool} if pool else options
    console.print(
        f"[bold]backbone[/bold]  {loaded.name}: {type(loaded.model).__name__}, "
        f"{host.sites.layers} layers, weights {loaded.weights}\n"
        f"[bold]sites[/bold]     {proofs(host)}\n"
        f"[bold]readout[/bold]   {pool or rule.pool} after {rule.norm or 'no norm'}, width "
        f"{rule.dim} ({'given' if pool else rule.proof})\n[bold]data[/bold]      {data.describe()}"
    )
    return host, options


def default_folder(data: Data, kind: str) -> Path:
    """Where a run goes that was given no folder."""
    return Path("runs") / f"{data.name}-{kind}-{time.strftime('%Y%m%d-%H%M%S')}"


def folder_name(method: str) -> str:
    """A method as part of a path."""
    return method.replace("[", "-").replace("]", "").replace(",", "-").replace("=", "-")


def train_one(
    method: str,
    host: Extractor,
    source: Source,
    data: Data,
    backbone: Backbone,
    settings: FitSettings,
    out: Path,
    options: dict[str, Any],
    resume: bool,
    console: Console,
    head: nn.Linear | None = None,
    told: dict[str, Any] | None = None,
    begin: Callable[[Task], None] | None = None,
) -> dict[str, Any]:
    """Train and test one method.

    `told` goes into its `metrics.json` as well; `begin` gives the task other first weights.
    """
    torch.manual_seed(settings.seed)
    task = methods.build(method, host, num_classes=data.num_classes, head=head, **options)
    task.labels = data.labels
    device = host.device
    task = task.to(device)
    if begin is not None:
        begin(task)
    console.print(
        f"\n[bold]{method}[/bold]  {task.trainable_parameters():,} trainable parameters, "
        f"{task.tuner_parameters():,} without the head; {settings.epochs} epochs, lr {settings.lr}"
    )
    kept = source.features(
        task,
        host,
        backbone,
        settings.workers,
        lambda line: console.print(f"  from stored features: {line}", highlight=False),
    )
    fed = data if kept is None else kept.data(data, final=source.final)
    tuned: nn.Module = Tuned(host, task) if kept is None else Cached(host, task, kept.store)
    fed = replace(fed, train=solve_closed_form([task], fed.train))
    start = None
    if head is not None and fed.val is not None:
        start = evaluate(tuned, fed.val, settings.batch_size, fed.collate)["accuracy"]
        console.print(f"  zero-shot: {start:.1%} on validation, before any training")
    result = fit(
        tuned, fed.train, fed.val, settings=settings, out=out, collate=fed.collate, resume=resume
    )
    tested = (
        evaluate(tuned, fed.test, settings.batch_size, fed.collate)
        if fed.test is not None
        else {"accuracy": None}
    )
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
        "zero_shot_val_accuracy": start,
        "val_accuracy": result.val_accuracy,
        "train_loss": result.train_loss,
        "steps": result.steps,
        "memory_measure": result.memory_measure,
        "forecast": forecast_run(
            Run(
                tuned,
                fed.train,
                fed.val,
                fed.collate,
                settings.batch_size,
                settings.accumulate,
                settings.epochs,
                settings.precision,
                settings.ema is not None,
            )
        ),
        "backbone": backbone.name,
        "weights": backbone.weights,
        "fingerprint": host.fingerprint(),
        "data": {"name": data.name, "identity": data.identity, "skipped": data.skipped},
        "features": None
        if kept is None
        else {
            "store": str(kept.store.path),
            "digest": kept.store.key.digest,
            "tokens": kept.store.key.tokens,
            "dtype": kept.store.key.dtype,
            "precision": kept.store.key.precision,
            "views": kept.views,
            "bytes": kept.store.bytes,
            "built_seconds": kept.seconds,
        },
        "settings": settings.to_dict(),
        "options": options,
        **(told or {}),
        "versions": {"restuning": __version__, "torch": torch.__version__},
        "hardware": {
            "device": str(device),
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
        },
    }
    save(
        task,
        host,
        out / f"{data.name}.task",
        backbone=backbone.name,
        preprocessing=data.notes.get("preprocessing")
        or (backbone.preprocessing.to_dict() if backbone.preprocessing else None),
        results={"test accuracy": tested["accuracy"], "seed": settings.seed},
    )
    (out / "metrics.json").write_text(json.dumps(more, indent=1) + "\n", encoding="utf-8")
    (out / "settings.json").write_text(
        json.dumps({"method": method, "options": options, **settings.to_dict()}, indent=1) + "\n",
        encoding="utf-8",
    )
    return row
