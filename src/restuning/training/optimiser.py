"""AdamW for tuners, and the learning rate as a function of the step alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from restuning._errors import TrainingError
from restuning.bypass import SideNetwork


def parameter_groups(
    parameters: Iterable[Tensor],
    weight_decay: float,
    *,
    lambdas: Iterable[Tensor] = (),
    lambda_rate: float = 1.0,
) -> list[dict]:
    """Two groups: matrices decay; biases, scales and gates do not. A third where lambdas are faster.

    Decided by the number of dimensions, not by name: a gate of a user's own tuner is spared too.
    A group's `rate` multiplies the learning rate.

    Args:
        parameters: Those without `requires_grad` are left out.
        weight_decay: Decay of tensors with two dimensions or more.
        lambdas: Which of the parameters are lambdas of a bypass.
        lambda_rate: What multiplies their learning rate.
    """
    trained = [p for p in parameters if p.requires_grad]
    # A group of their own only where they differ: checkpoints number parameters by group.
    apart = {id(p) for p in lambdas} if lambda_rate != 1 else set()
    common = [p for p in trained if id(p) not in apart]
    groups = [
        {"params": [p for p in common if p.ndim > 1], "weight_decay": weight_decay, "rate": 1.0},
        {"params": [p for p in common if p.ndim <= 1], "weight_decay": 0.0, "rate": 1.0},
        {
            "params": [p for p in trained if id(p) in apart],
            "weight_decay": 0.0,
            "rate": lambda_rate,
        },
    ]
    return [g for g in groups if g["params"]]


def find_lambdas(task: nn.Module) -> dict[str, nn.Parameter]:
    """The lambdas of the side networks in a task (`SideNetwork.lambda_names`), by name."""
    return {
        f"{path}.{name}".removeprefix("."): module.get_parameter(name)
        for path, module in task.named_modules()
        if isinstance(module, SideNetwork)
        for name in module.lambda_names
    }


def build_optimiser(
    task: nn.Module, *, lr: float, weight_decay: float, lambda_rate: float = 1.0
) -> torch.optim.AdamW:
    """AdamW over the task's trainable parameters.

    Raises:
        TrainingError: The task has none.
    """
    groups = parameter_groups(
        task.parameters(),
        weight_decay,
        lambdas=find_lambdas(task).values(),
        lambda_rate=lambda_rate,
    )
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
        # Not from zero: the first step would change nothing.
        return peak * (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * done))


def set_rates(groups: Iterable[dict], rate: float) -> None:
    """Set the learning rate of a step; a group's own `rate` multiplies it."""
    for group in groups:
        group["lr"] = rate * group["rate"]


class Ema:
    """Exponential moving average of a module's state; buffers of whole numbers are copied.

    torch's `AveragedModel` would give other weights: it takes those after the first step for its start,
    and averages whole numbers with all other buffers, or else leaves buffers out.

    Args:
        module: Averaged from its present state on.
        decay: Share of the old mean that is kept at a step, reached gradually: the first steps
            would otherwise weigh the starting point for hundreds of steps.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.mean = {n: t.detach().clone() for n, t in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take in the weights after step number `step` (from 1)."""
        # The warm-up of TensorFlow's ExponentialMovingAverage (`num_updates`).
        keep = min(self.decay, (1 + step) / (10 + step))
        for name, tensor in module.state_dict().items():
            mean = self.mean[name]
            if mean.is_floating_point():
                mean.lerp_(tensor.detach().to(mean.dtype), 1.0 - keep)
            else:
                mean.copy_(tensor)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved mean."""
        for name, mean in self.mean.items():
            mean.copy_(state[name])

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Put the mean in the module's place."""
        for name, tensor in module.state_dict().items():
            tensor.copy_(self.mean[name])

    @contextmanager
    def swap_in(self, module: nn.Module) -> Iterator[None]:
        """The module carries the mean inside the block and its own weights after it.

        What is set inside the block (`SideNetwork.conclude`) is of the mean and stays with it.
        """
        trained = {n: t.detach().clone() for n, t in module.state_dict().items()}
        self.copy_to(module)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in module.state_dict().items():
                    self.mean[name].copy_(tensor)
                    tensor.copy_(trained[name])
