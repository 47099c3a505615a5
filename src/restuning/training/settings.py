"""Everything a training run can be asked to do, with the reason for every default."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from restuning._errors import TrainingError
from restuning.training.callbacks import (
    METRIC,
    BestCheckpoint,
    Callback,
    EarlyStopping,
    check_monitor,
)
from restuning.training.trackers import check_track

PRECISIONS = ("no", "bf16", "fp16")
BALANCED = "balanced"
"""Weights of classes, in scikit-learn's word."""


@dataclass(frozen=True)
class LoopSettings:
    """What the loop needs to know, whatever it trains; `FitSettings` says what each setting means.

    Raises:
        TrainingError: A value is out of its range.
    """

    WITHOUT_EFFECT: ClassVar[tuple[str, ...]] = ("checkpoint_every", "track")
    """Settings that may change between two halves of a run: the weights come out the same."""

    batch_size: int = 64
    lr: float = 1e-3
    lambda_rate: float = 1.0
    weight_decay: float = 1e-4
    precision: str = "no"
    accumulate: int = 1
    clip: float | None = None
    ema: float | None = None
    seed: int = 0
    checkpoint_every: int = 100
    track: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        # The class is frozen, and this is the one moment at which it may still change itself.
        object.__setattr__(self, "track", check_track(self.track))
        for name in ("batch_size", "accumulate", "checkpoint_every"):
            self._require_whole(name, least=1)
        self._require_whole("seed", least=0)
        self._require(self.seed < MOST_SEEDS, "seed", "give a whole number below 2**63")
        for name in ("lr", "lambda_rate"):
            self._require(is_number(value := getattr(self, name)) and value > 0, name, ABOVE_ZERO)
        decay = self.weight_decay
        self._require(is_number(decay) and decay >= 0, "weight_decay", "give 0 or more")
        self._require(
            self.clip is None or (is_number(self.clip) and self.clip > 0),
            "clip",
            f"{ABOVE_ZERO}, or none",
        )
        self._require(
            self.ema is None or (is_number(self.ema) and 0 < self.ema < 1),
            "ema",
            "give a number between 0 and 1 such as 0.999, or none",
        )
        names = ", ".join(PRECISIONS)
        self._require(self.precision in PRECISIONS, "precision", f"choose one of {names}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they are written to JSON; of trackers those that have a name, which a file can say."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {**values, "track": [each for each in self.track if isinstance(each, str)]}

    def identity(self) -> dict[str, Any]:
        """The settings that the resulting weights depend on."""
        # Runs from before there were such settings go on as what they are.
        usual = {
            "lambda_rate": 1,
            "class_weights": None,
            "balanced_sampling": False,
            "early_stopping": None,
            "keep_best": False,
            "monitor": METRIC,
        }
        plain = [name for name, value in usual.items() if getattr(self, name, value) == value]
        return {k: v for k, v in self.to_dict().items() if k not in (*self.WITHOUT_EFFECT, *plain)}

    def _require_whole(self, name: str, *, least: int) -> None:
        value = getattr(self, name)
        # True is an int to Python, and `epochs=True` a mistake.
        whole = isinstance(value, int) and not isinstance(value, bool)
        self._require(whole and value >= least, name, f"give a whole number from {least}")

    def _require_share(self, name: str) -> None:
        value = getattr(self, name)
        self._require(is_number(value) and 0 <= value < 1, name, "give 0 or more, below 1")

    def _require(self, holds: bool, name: str, fix: str) -> None:
        if not holds:
            raise _out_of_range(name, getattr(self, name), fix)


ABOVE_ZERO = "give a number above 0"

MOST_SEEDS = 2**63
"""What generators of torch take."""


def is_number(value: object) -> bool:
    """Whether a value is finite and can be counted with; True is no number here."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _out_of_range(name: str, value: object, fix: str) -> TrainingError:
    return TrainingError("a setting is out of its range", where=name, found=repr(value), fix=fix)


@dataclass(frozen=True)
class FitSettings(LoopSettings):
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
        class_weights: "balanced" weighs each example's loss inversely by how often its class is in the training
            split (of several labels each label's, see `Problem.balance`), 1 on average; None
            weighs all alike.
        balanced_sampling: Take as many examples of each class (or label) in every epoch, rare ones several
            times and some of the frequent ones not at all; an epoch stays as long as it is.
        drop_path: Chance to drop a tuner's contribution. It is applied where methods are built and
            stands here so that it is recorded with the run (Adapter+ and the OSU study use 0.1).
        ema: Decay of a running mean of the weights, which is then what is evaluated and left in
            the task; None keeps no mean.
        seed: Order of examples, augmentation and dropout.
        workers: Processes that load data; 0 loads in this one.
        checkpoint_every: Steps between two checkpoints.
        track: Trackers that are told of the run: names of `training.trackers.TRACKERS`, or a
            `GeneralTracker` of Accelerate.
        early_stopping: End after so many epochs in which validation was no better than its best; None trains
            to the last epoch. Which weights are left is another question:
        keep_best: Leave the weights of the epoch that was best on validation. By itself the last are left, and
            figures of validation then choose nothing.
        monitor: What both of them follow: "metric" (the figure of the task's problem) or "loss".

    Raises:
        TrainingError: A value is out of its range.
    """

    WITHOUT_EFFECT: ClassVar[tuple[str, ...]] = (*LoopSettings.WITHOUT_EFFECT, "workers")

    epochs: int = 20
    warmup_epochs: float | None = None
    label_smoothing: float = 0.0
    class_weights: str | None = None
    balanced_sampling: bool = False
    drop_path: float = 0.0
    workers: int = 0
    early_stopping: int | None = None
    keep_best: bool = False
    monitor: str = METRIC

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_whole("epochs", least=1)
        self._require_whole("workers", least=0)
        for name in ("label_smoothing", "drop_path"):
            self._require_share(name)
        weights = self.class_weights
        self._require(weights in (None, BALANCED), "class_weights", f'give "{BALANCED}", or none')
        self._require(
            isinstance(self.balanced_sampling, bool), "balanced_sampling", "give true or false"
        )
        warmup = self.warmup_epochs
        self._require(
            warmup is None or (is_number(warmup) and 0 <= warmup <= self.epochs),
            "warmup_epochs",
            f"give 0 to {self.epochs} (all epochs)",
        )

        if self.early_stopping is not None:
            self._require_whole("early_stopping", least=1)
        self._require(isinstance(self.keep_best, bool), "keep_best", "give true or false")
        check_monitor(self.monitor)

    def callbacks(self) -> list[Callback]:
        """The callbacks that these settings ask for, new."""
        found: list[Callback] = []
        if self.early_stopping is not None:
            found.append(EarlyStopping(self.early_stopping, self.monitor))
        if self.keep_best:
            found.append(BestCheckpoint(self.monitor))
        return found

    @property
    def warmup(self) -> float:
        """Epochs of warm-up, with the default worked out."""
        return self.epochs / 10 if self.warmup_epochs is None else float(self.warmup_epochs)
