"""AdamW for tuners, and the learning rate as a function of the step alone."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from restuning._errors import TrainingError


def parameter_groups(parameters: Iterable[Tensor], weight_decay: float) -> list[dict]:
    """Two groups: matrices decay; biases, scales and gates do not.

    Decided by the number of dimensions, not by name: a gate of a user's own tuner is spared too.

    Args:
        parameters: Those without `requires_grad` are left out.
        weight_decay: Of the tensors with two dimensions or more.
    """
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


def build_optimiser(task: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over the task's trainable parameters.

    Raises:
        TrainingError: The task has none.
    """
    groups = parameter_groups(task.parameters(), weight_decay)
    if not groups:
        raise TrainingError(
            "the task has nothing to train",
            found="no parameter with requires_grad",
            fix="choose a method with tuners, or a task with a head",
        )
    return adamw(groups, lr=lr)


def adamw(groups: list[dict], *, lr: float) -> torch.optim.AdamW:
    """AdamW as one pass over each weight, where the device has that (CPU and CUDA do).

    Tuners are a hundred small tensors: one operation after the other costs more than the backward
    pass through them.
    """
    devices = {p.device.type for group in groups for p in group["params"]}
    return torch.optim.AdamW(groups, lr=lr, fused=devices <= {"cpu", "cuda"})


def learning_rate(step: int, *, total: int, warmup: int, peak: float, floor: float = 0.0) -> float:
    """Linear warm-up to `peak`, then half a cosine down to `floor`.

    A pure function: a resumed run needs the step and nothing else.

    Args:
        step: From 0; the rate of the step about to be made.
        total: Steps of the whole run.
        warmup: Steps of warm-up; step `warmup` is the first at the peak.
        peak: Highest rate.
        floor: Rate at step `total`, which is never made.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * done))
