"""The settings of one run of `train_denoiser`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from restuning.training.settings import LoopSettings


@dataclass(frozen=True)
class DenoiserSettings(LoopSettings):
    """How a task of a denoiser is trained.

    Args:
        steps: Optimiser steps.
        batch_size: Images of a step, over all processes.
        lr: Highest learning rate; warm-up, then half a cosine down to zero.
        lambda_rate: What multiplies `lr` for the lambdas of a bypass.
        weight_decay: AdamW's, for matrices only.
        warmup_steps: None for a tenth of the steps, at most 500.
        caption_drop: Share of captions replaced by the empty one, for guidance without a
            classifier; 0.1 as Stable Diffusion was trained.
        clip: Largest gradient norm; 1 as diffusers' examples have it, None for no limit.
        ema: Decay of a running mean of the weights, which is then what is left in the task.
        seed: Seed of order, noise, times and dropped captions.
        precision: "no", "bf16" or "fp16".
        accumulate: Pieces a batch is run in.
        checkpoint_every: Steps between two checkpoints.
        sample_every: Steps between two sample grids and task folders; None for one at the end.
        track: Trackers that are told of the run, as of `FitSettings`.

    Raises:
        TrainingError: A value is out of its range.
    """

    WITHOUT_EFFECT: ClassVar[tuple[str, ...]] = (*LoopSettings.WITHOUT_EFFECT, "sample_every")

    steps: int = 1000
    batch_size: int = 16
    warmup_steps: int | None = None
    caption_drop: float = 0.1
    clip: float | None = 1.0
    sample_every: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_whole("steps", least=1)
        for name, least in (("warmup_steps", 0), ("sample_every", 1)):
            if getattr(self, name) is not None:
                self._require_whole(name, least=least)
        self._require_share("caption_drop")

    @property
    def warmup(self) -> int:
        """Steps of warm-up."""
        return min(500, self.steps // 10) if self.warmup_steps is None else self.warmup_steps
