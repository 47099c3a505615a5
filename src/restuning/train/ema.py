"""A running mean of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Exponential moving average of a module's state; buffers of whole numbers are copied.

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
    def applied(self, module: nn.Module) -> Iterator[None]:
        """The module carries the mean inside the block and its own weights after it."""
        own = {n: t.detach().clone() for n, t in module.state_dict().items()}
        self.copy_to(module)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in module.state_dict().items():
                    tensor.copy_(own[name])
