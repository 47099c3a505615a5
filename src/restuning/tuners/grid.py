"""What patches say of rows and columns: profiles of a square grid."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

BINS = 7
"""Of a profile along rows or columns. Chosen on the validation splits of three tasks: `docs/mixing.md`."""


def average_profiles(tokens: Tensor) -> Tensor:
    """Means along the rows and along the columns of a square grid, `b n c -> b 2*7*c`."""
    side = math.isqrt(tokens.shape[1])
    channels = tokens.transpose(1, 2).unflatten(2, (side, side))
    return torch.cat(
        [F.adaptive_avg_pool1d(channels.mean(axis), BINS).flatten(1) for axis in (2, 3)], 1
    )
