"""Images from a denoiser: DDIM for noise and velocity, Euler steps for flow."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from restuning.diffusion.objective import Objective

Denoiser = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""`(sample b ..., times b, conditions) -> answer b ...`."""


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    objective: Objective,
    noise: Tensor,
    conditions: Mapping[str, Tensor],
    *,
    steps: int = 20,
    guidance: float = 1.0,
    empty: Mapping[str, Tensor] | None = None,
    clip: float | None = None,
) -> Tensor:
    """Denoise in equal steps, without randomness of its own (eta 0).

    Args:
        denoiser: Answers a batch.
        objective: The objective it was trained for.
        noise: The start, `b ...`.
        conditions: Tensors of b rows.
        steps: Denoiser calls.
        guidance: `empty + guidance (conditioned - empty)`, both in one batch; 1 leaves it out.
        empty: Conditions of the empty caption, of b rows or one.
        clip: Largest value of a clean sample, for pixels.

    Returns:
        `b ...`.
    """
    x, count = noise, len(noise)
    twice = guidance != 1.0 and empty is not None
    inputs = dict(conditions)
    if twice and empty is not None:
        # The empty caption first: `chunk` takes them apart in this order.
        inputs = {
            k: torch.cat([empty[k].expand(count, *empty[k].shape[1:]), v])
            for k, v in conditions.items()
        }
    grid = _time_grid(objective, steps)
    for now, after in zip(grid[:-1], grid[1:], strict=True):
        times = now.expand(count)
        # A flow counts from 0 to 1, whatever its model was taught to count in.
        model_time = times * objective.time_scale if objective.kind == "flow" else times
        if twice:
            bare, led = denoiser(
                torch.cat([x, x]), torch.cat([model_time, model_time]), inputs
            ).chunk(2)
            answer = bare + guidance * (led - bare)
        else:
            answer = denoiser(x, model_time, inputs)
        clean, implied = objective.clean_and_noise(x, answer, times)
        if clip is not None:
            clean = clean.clamp(-clip, clip)
        x = _renoise(objective, clean, implied, after)
    return x


def _time_grid(objective: Objective, steps: int) -> Tensor:
    """Times from noise to clean; the last stands for no noise at all."""
    if objective.kind == "flow":
        return torch.linspace(1, 0, steps + 1)
    assert objective.alphas is not None
    total = len(objective.alphas)
    # "Trailing" steps begin at pure noise (Lin et al. 2024).
    return torch.linspace(total, 0, steps + 1).round().long() - 1


def _renoise(objective: Objective, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    if objective.kind == "flow":
        return (1 - time) * clean + time * noise
    assert objective.alphas is not None
    if time < 0:
        return clean
    a = objective.alphas[time].to(clean)
    return a.sqrt() * clean + (1 - a).sqrt() * noise
