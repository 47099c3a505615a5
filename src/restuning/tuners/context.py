"""What a tuner may know of the forward it runs in: which tokens are real, and the time step.

Both belong to one thread. A tuner that needs neither never looks.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_local = threading.local()
# Of this thread alone: in others the attribute is missing, hence `getattr` below.
_local.mask = None


@contextmanager
def real_tokens(mask: Tensor | None) -> Iterator[None]:
    """Tuners that run inside see this mask, `b n`; None where every token is real."""
    before = getattr(_local, "mask", None)
    _local.mask = mask
    try:
        yield
    finally:
        _local.mask = before


def read_real_tokens() -> Tensor | None:
    """The mask that `real_tokens` set in this thread."""
    return getattr(_local, "mask", None)


def attention_mask(x: Tensor) -> Tensor | None:
    """What attention over the tokens of x may see, `b 1 1 n` true where real; None for all."""
    mask = read_real_tokens()
    # Learned tokens and pooled streams are not what the mask describes.
    if mask is None or mask.shape != x.shape[:-1]:
        return None
    # A row of padding alone would give no number: it may see all of itself.
    return (mask | ~mask.any(-1, keepdim=True))[:, None, None]


def average_real_tokens(x: Tensor) -> Tensor:
    """Mean over the real tokens, `b n d -> b 1 d`."""
    mask = read_real_tokens()
    if mask is None:
        return x.mean(-2, keepdim=True)
    real = mask.unsqueeze(-1)
    # Not a product with the mask: padding may hold NaN.
    total = torch.where(real, x, torch.zeros_like(x)).sum(-2, keepdim=True)
    return total / real.sum(-2, keepdim=True).clamp(min=1).to(x.dtype)


@contextmanager
def at_time(steps: Tensor | None) -> Iterator[None]:
    """Tuners that run inside see these time steps, `b` or `1`; None where there are none."""
    before = getattr(_local, "steps", None)
    _local.steps = steps
    try:
        yield
    finally:
        _local.steps = before


def read_timestep() -> Tensor | None:
    """The time steps of this thread's forward."""
    return getattr(_local, "steps", None)
