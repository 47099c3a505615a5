"""One step's batch: which images, how noised, with which captions dropped."""

from __future__ import annotations

import torch
from torch import Tensor

from restuning.diffusion.encode import EncodedPairs
from restuning.diffusion.objective import NoisyBatch, Objective
from restuning.diffusion.settings import DenoiserSettings
from restuning.runtime.randomness import mix_seed
from restuning.training.randomness import Order


def draw_batch(
    data: EncodedPairs,
    objective: Objective,
    settings: DenoiserSettings,
    order: Order,
    step: int,
    rank: int = 0,
    world: int = 1,
) -> tuple[NoisyBatch, dict[str, Tensor]]:
    """One process's noised samples and conditions of a step.

    All is drawn for the whole batch and then shared out, so that k processes train on what one
    would.

    Args:
        data: Encoded images and captions.
        objective: How samples are noised.
        settings: Seed and share of dropped captions.
        order: Which images make up which step.
        step: From 0.
        rank: Number of this process.
        world: Number of processes.
    """
    batch, size = order.batch(step), order.size(step)
    # On the CPU, so that every device trains on the same numbers. Whatever is drawn below must keep
    # its place in line.
    draw = torch.Generator().manual_seed(mix_seed("noise", settings.seed, step))
    clean = data.latents(batch, draw)
    noise = torch.randn(clean.shape, generator=draw)
    noised = objective.add_noise(clean, noise, objective.draw_times(size, draw))
    dropped = torch.rand(size, generator=draw) < settings.caption_drop
    share = slice(size * rank // world, size * (rank + 1) // world)
    if share.start == share.stop:
        # As `Order.share`: a process without an example runs one that does not count.
        share = slice(0, 1)
    return NoisyBatch(*(part[share] for part in noised)), data.conditions(
        batch[share], dropped[share]
    )
