"""The settings of one run of `train_denoiser`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from restuning._errors import TrainingError

WITHOUT_EFFECT = ("checkpoint_every", "sample_every")
"""Settings that the resulting weights do not depend on."""


@dataclass(frozen=True)
class DenoiserSettings:
    """How a task of a denoiser is trained.

    Args:
        steps: Of the optimiser.
        batch_size: Images of a step, over all processes.
        lr: Highest learning rate; warm-up, then half a cosine down to zero.
        weight_decay: Of matrices.
        warmup_steps: None for a tenth of the steps, at most 500.
        caption_drop: Share of captions replaced by the empty one, for guidance without a
            classifier; 0.1 as Stable Diffusion was trained.
        clip: Largest gradient norm; 1 as diffusers' examples have it, None for no limit.
        ema: Decay of a running mean of the weights, which is then what is left in the task.
        seed: Of order, noise, times and dropped captions.
        precision: "no", "bf16" or "fp16".
        accumulate: Pieces a batch is run in.
        checkpoint_every: Steps between two checkpoints.
        sample_every: Steps between two sample grids and task folders; None for one at the end.

    Raises:
        TrainingError: A value is out of its range.
    """

    steps: int = 1000
    batch_size: int = 16
    lr: float = 1e-3
    weight_decay: float = 1e-4
    warmup_steps: int | None = None
    caption_drop: float = 0.1
    clip: float | None = 1.0
    ema: float | None = None
    seed: int = 0
    precision: str = "no"
    accumulate: int = 1
    checkpoint_every: int = 100
    sample_every: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "checkpoint_every"):
            _demand(_whole(getattr(self, name), 1), name, getattr(self, name), "give 1 or more")
        for name in ("warmup_steps", "sample_every"):
            value = getattr(self, name)
            _demand(value is None or _whole(value, 0), name, value, "give a whole number")
        _demand(_whole(self.seed, 0), "seed", self.seed, "give 0 or more")
        _demand(_number(self.lr) and self.lr > 0, "lr", self.lr, "give a number above 0")
        _demand(
            _number(self.weight_decay) and self.weight_decay >= 0,
            "weight_decay",
            self.weight_decay,
            "give 0 or more",
        )
        _demand(
            _number(self.caption_drop) and 0 <= self.caption_drop < 1,
            "caption_drop",
            self.caption_drop,
            "give 0 or more, below 1",
        )
        for name, below in (("clip", math.inf), ("ema", 1.0)):
            value = getattr(self, name)
            fits = value is None or (_number(value) and 0 < value < below)
            _demand(fits, name, value, "give a number above 0, or none")
        _demand(
            self.precision in ("no", "bf16", "fp16"),
            "precision",
            self.precision,
            "choose one of no, bf16, fp16",
        )

    @property
    def warmup(self) -> int:
        """Steps of warm-up."""
        return min(500, self.steps // 10) if self.warmup_steps is None else self.warmup_steps

    def identity(self) -> dict[str, Any]:
        """The settings that the resulting weights depend on."""
        return {k: v for k, v in asdict(self).items() if k not in WITHOUT_EFFECT}


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _demand(holds: bool, name: str, value: object, fix: str) -> None:
    if not holds:
        raise TrainingError("a setting is out of its range", where=name, found=repr(value), fix=fix)
