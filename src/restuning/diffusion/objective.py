"""What a denoiser is trained to predict: noise, velocity or flow, and how samples are weighed.

Letters in formulas: x0 a clean sample, e standard normal noise, t a time step, `a_t` the cumulative
product of alphas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from restuning._errors import TrainingError

Kind = Literal["epsilon", "v", "flow"]
KINDS = ("epsilon", "v", "flow")

STEPS = 1000
"""Time steps of the noise schedules in use; flow models count their times in thousandths as well."""


class NoisyBatch(NamedTuple):
    """A noised batch.

    Attributes:
        sample: `b ...`, what the denoiser reads.
        time: `b`, what it is told.
        target: `b ...`, what it should answer.
        weight: `b`, of each sample's squared error.
    """

    sample: Tensor
    time: Tensor
    target: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Objective:
    r"""Noising and target.

    - "epsilon": `x_t = sqrt(a_t) x0 + sqrt(1 - a_t) e`, target e (Ho et al. 2020).
    - "v": the same x_t, target `sqrt(a_t) e - sqrt(1 - a_t) x0` (Salimans and Ho 2022).
    - "flow": `x_t = (1 - s) x0 + s e`, target `e - x0`, s the sigmoid of a normal number (rectified
      flow with logit-normal times, Esser et al. 2024).

    Args:
        kind: One of the three.
        alphas: `a_t` for t = 0 ... T-1, of "epsilon" and "v"; the denoiser's own scheduler has it.
        min_snr: Cap on the signal-to-noise ratio in the weights (5 in Hang et al. 2023), which
            keeps easy, hardly noised samples from ruling; None weighs all alike.
        time_scale: What the denoiser is told at the end of time: T, or 1 for Flux.

    Raises:
        TrainingError: No such kind, or no schedule, or a cap where none is defined.
    """

    kind: Kind
    alphas: Tensor | None = None
    min_snr: float | None = None
    time_scale: float = float(STEPS)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise TrainingError(
                "no such objective", where=str(self.kind), fix=f"one of {', '.join(KINDS)}"
            )
        if self.kind != "flow" and self.alphas is None:
            raise TrainingError(
                "this objective needs a noise schedule",
                where=self.kind,
                fix="give alphas, e.g. pipeline.scheduler.alphas_cumprod",
            )
        if self.min_snr is not None and not self.min_snr > 0:
            raise TrainingError(
                "a cap of min-SNR weights is above 0",
                where="min_snr",
                found=str(self.min_snr),
                fix="give 5, or none",
            )
        if self.kind == "flow" and self.min_snr is not None:
            raise TrainingError(
                "min-SNR weights are those of a noise schedule",
                where="flow",
                fix="leave min_snr out",
            )

    def draw_times(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Random times of a batch: whole steps, or for "flow" numbers between 0 and 1."""
        if self.kind == "flow":
            return torch.randn(count, generator=generator).sigmoid()
        assert self.alphas is not None
        return torch.randint(len(self.alphas), (count,), generator=generator)

    def add_noise(self, clean: Tensor, noise: Tensor, times: Tensor) -> NoisyBatch:
        """A batch at given times, `b ...` each and `b`."""
        wide = (-1, *[1] * (clean.dim() - 1))
        ones = torch.ones(len(clean), device=clean.device)
        if self.kind == "flow":
            s = times.to(clean).view(wide)
            return NoisyBatch(
                (1 - s) * clean + s * noise, times * self.time_scale, noise - clean, ones
            )
        assert self.alphas is not None
        a = self.alphas.to(clean)[times].view(wide)
        sample = a.sqrt() * clean + (1 - a).sqrt() * noise
        target = noise if self.kind == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * clean
        if self.min_snr is None:
            return NoisyBatch(sample, times, target, ones)
        # Hang et al. 2023: min(SNR, cap) / SNR on noise, which is / (SNR + 1) on velocity.
        ratio = a.flatten() / (1 - a.flatten())
        capped = ratio.clamp(max=self.min_snr)
        weight = capped / ratio if self.kind == "epsilon" else capped / (ratio + 1)
        return NoisyBatch(sample, times, target, weight)

    def clean_and_noise(
        self, sample: Tensor, answer: Tensor, times: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x0 and e as a denoiser's answer implies them; the inverse of `add_noise`."""
        wide = (-1, *[1] * (sample.dim() - 1))
        if self.kind == "flow":
            s = times.to(sample).view(wide)
            # From x = (1 - s) x0 + s e and the answer e - x0.
            return sample - s * answer, sample + (1 - s) * answer
        assert self.alphas is not None
        a = self.alphas.to(sample)[times].view(wide)
        if self.kind == "epsilon":
            return (sample - (1 - a).sqrt() * answer) / a.sqrt(), answer
        # (x, v) is (x0, e) turned by an angle whose cosine is sqrt(a); this turns it back.
        return a.sqrt() * sample - (1 - a).sqrt() * answer, a.sqrt() * answer + (
            1 - a
        ).sqrt() * sample


def linear_alphas(steps: int = STEPS, start: float = 1e-4, end: float = 0.02) -> Tensor:
    """The linear schedule of Ho et al. 2020."""
    # In float64: a product of 1000 numbers near one loses digits in float32.
    return (1 - torch.linspace(start, end, steps, dtype=torch.float64)).cumprod(0).float()
