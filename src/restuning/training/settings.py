"""Everything a training run can be told, with the reason for every default."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from restuning._errors import TrainingError
from restuning._files import refuse_other

PRECISIONS = ("no", "bf16", "fp16")
TRACKERS = ("tensorboard", "wandb")
WITHOUT_EFFECT = ("workers", "checkpoint_every", "track")
"""Settings that may change between two halves of a run: the weights come out the same."""


@dataclass(frozen=True)
class FitSettings:
    """The settings of one `fit`.

    The paper prints no training settings, so the defaults come from the published code of its
    rivals, as each line says. All of them are checked when the object is made.

    Args:
        epochs: Passes over the training data. Benchmarks of the field use 100 with 800 to 1000
            images (Adapter+, DTL, HST, DyT); 20 is our default for a first result.
        batch_size: Examples of one optimiser step, over all processes and pieces (64: Adapter+,
            DyT, the OSU study).
        lr: Highest learning rate (1e-3: DyT, HyperAdapter, and in DTL's and the OSU study's range).
        lambda_rate: What multiplies `lr` for the lambdas of a bypass. An AdamW step moves a number by
            about its rate, so that at the common one a lambda goes from 0.5 to 0.7 in a short run
            at most (1: results from before this setting stay what they were).
        weight_decay: AdamW's, for matrices only (1e-4: DyT, HyperAdapter).
        warmup_epochs: Epochs of linear warm-up; None is a tenth of `epochs` (Adapter+: 10 of 100).
        label_smoothing: Mass given to the other classes (0: none of the rivals above states any).
        precision: "no", "bf16" or "fp16" autocast ("no": results are then equal on any machine).
        accumulate: Pieces a batch is run in. The step is the same; the memory is less.
        clip: Largest norm of the gradient; None does not clip (a choice of ours: tuners start at
            or near zero, so gradients start small).
        drop_path: Chance to drop a tuner's contribution. It is applied where methods are built and
            stands here so that it is recorded with the run (Adapter+ and the OSU study use 0.1).
        ema: Decay of a running mean of the weights, which is then what is evaluated and left in
            the task; None keeps no mean.
        seed: Order of examples, augmentation and dropout.
        workers: Processes that load data; 0 loads in this one.
        checkpoint_every: Steps between two checkpoints.
        track: "tensorboard", "wandb", or both.

    Raises:
        TrainingError: A value is out of its range.
    """

    epochs: int = 20
    batch_size: int = 64
    lr: float = 1e-3
    lambda_rate: float = 1.0
    weight_decay: float = 1e-4
    warmup_epochs: float | None = None
    label_smoothing: float = 0.0
    precision: str = "no"
    accumulate: int = 1
    clip: float | None = None
    drop_path: float = 0.0
    ema: float | None = None
    seed: int = 0
    workers: int = 0
    checkpoint_every: int = 100
    track: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        track = (self.track,) if isinstance(self.track, str) else tuple(self.track)
        object.__setattr__(self, "track", track)
        for name, least in (
            ("epochs", 1),
            ("batch_size", 1),
            ("accumulate", 1),
            ("checkpoint_every", 1),
            ("workers", 0),
            ("seed", 0),
        ):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            _demand(whole and value >= least, name, value, f"give a whole number from {least}")
        _demand(_number(self.lr) and self.lr > 0, "lr", self.lr, "give a number above 0")
        _demand(
            _number(self.lambda_rate) and self.lambda_rate > 0,
            "lambda_rate",
            self.lambda_rate,
            "give a number above 0",
        )
        _demand(
            _number(self.weight_decay) and self.weight_decay >= 0,
            "weight_decay",
            self.weight_decay,
            "give 0 or more",
        )
        for name in ("label_smoothing", "drop_path"):
            value = getattr(self, name)
            _demand(_number(value) and 0 <= value < 1, name, value, "give 0 or more, below 1")
        _demand(
            self.warmup_epochs is None
            or (_number(self.warmup_epochs) and 0 <= self.warmup_epochs <= self.epochs),
            "warmup_epochs",
            self.warmup_epochs,
            f"give 0 to {self.epochs} (all epochs)",
        )
        _demand(
            self.clip is None or (_number(self.clip) and self.clip > 0),
            "clip",
            self.clip,
            "give a number above 0, or none",
        )
        _demand(
            self.ema is None or (_number(self.ema) and 0 < self.ema < 1),
            "ema",
            self.ema,
            "give a number between 0 and 1 such as 0.999, or none",
        )
        _demand(
            self.precision in PRECISIONS,
            "precision",
            self.precision,
            f"choose one of {', '.join(PRECISIONS)}",
        )
        for name in self.track:
            _demand(name in TRACKERS, "track", name, f"choose from {', '.join(TRACKERS)}")

    @property
    def warmup(self) -> float:
        """Epochs of warm-up, with the default worked out."""
        return self.epochs / 10 if self.warmup_epochs is None else float(self.warmup_epochs)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they are written to JSON."""
        return {**asdict(self), "track": list(self.track)}

    def identity(self) -> dict[str, Any]:
        """The settings that the resulting weights depend on."""
        # Runs from before there was such a setting go on as what they are.
        plain = ("lambda_rate",) if self.lambda_rate == 1 else ()
        return {k: v for k, v in self.to_dict().items() if k not in (*WITHOUT_EFFECT, *plain)}


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _demand(holds: bool, name: str, value: object, fix: str) -> None:
    if not holds:
        raise TrainingError("a setting is out of its range", where=name, found=repr(value), fix=fix)


def run_identity(task: nn.Module, settings: FitSettings, train: Any, val: Any) -> dict[str, Any]:
    """The settings that matter, the sizes of the data, and a digest of the task's form."""
    form = {n: [list(t.shape), str(t.dtype)] for n, t in task.state_dict().items()}
    spec = task.spec() if callable(getattr(task, "spec", None)) else None  # type: ignore[operator]
    text = json.dumps([form, spec], sort_keys=True, default=str)
    return {
        **settings.identity(),
        "training examples": len(train),
        "validation examples": 0 if val is None else len(val),
        "task": hashlib.sha256(text.encode()).hexdigest()[:16],
    }


def check_same_run(before: Mapping[str, Any], now: Mapping[str, Any], out: Path) -> None:
    """Refuse to go on from a run with other settings.

    Raises:
        TrainingError: Names everything that differs.
    """
    fix = "use the settings of then, another --out, or --no-resume to start over"
    what = "this folder holds a run with other settings"
    refuse_other(before, now, out, what=what, fix=fix)


@dataclass(frozen=True)
class FitResult:
    """The figures of a finished run.

    Args:
        history: One entry an epoch: epoch, step, loss, accuracy, val_loss, val_accuracy, lr and
            seconds; the val figures are None without validation data.
        seconds: Of training and evaluation, summed over all resumed parts.
        peak_memory_bytes: Above the start of the run, largest of its parts; None if unmeasurable.
        memory_measure: How that was measured.
        steps: Optimiser steps.
        train_loss: Of the last epoch.
        train_accuracy: Of the last epoch, while it trained.
        val_accuracy: Of the final weights.
        val_loss: Of the final weights.
    """

    history: list[dict[str, Any]]
    seconds: float
    peak_memory_bytes: int | None
    memory_measure: str
    steps: int
    train_loss: float
    train_accuracy: float
    val_accuracy: float | None
    val_loss: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they are written to JSON."""
        return asdict(self)
