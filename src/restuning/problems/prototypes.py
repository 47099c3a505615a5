"""Fixed directions for classes, as far from each other as their number allows."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

STEPS, RATE = 300, 0.1
"""Of moving more directions than fit into a simplex apart: on 100 in 32 dimensions the largest cosine stays after 200."""


@lru_cache(maxsize=8)
# What is kept was maybe asked for first where nothing is trained.
@torch.inference_mode(False)
def find_prototypes(classes: int, dimensions: int) -> Tensor:
    r"""Unit vectors, `C d` in double precision, whose largest cosine is as small as can be, or nearly.

    Of `d >= C - 1` they are the corners of a regular simplex, with all cosines `-1 / (C - 1)`, in the first `C - 1` dimensions.
    In fewer they start at random (seed 0) and are moved apart: each against the mean of the others, weighed by
    `softmax(t cos)` with t growing to 50.

    Cost: of fewer dimensions 300 products `C C d`, once.
    """
    if classes == 1:
        return F.pad(torch.ones(1, 1, dtype=torch.float64), (0, dimensions - 1))
    if dimensions >= classes - 1:
        corners = torch.zeros(classes, dimensions, dtype=torch.float64)
        for k in range(1, classes):
            # Helmert's basis of all that sums to zero.
            corners[:k, k - 1] = 1 / (k * (k + 1)) ** 0.5
            corners[k, k - 1] = -k / (k * (k + 1)) ** 0.5
        return F.normalize(corners, dim=1)
    draw = torch.Generator().manual_seed(0)
    found = F.normalize(torch.randn(classes, dimensions, generator=draw, dtype=torch.float64))
    for step in range(STEPS):
        cosines = found @ found.T
        cosines.fill_diagonal_(-torch.inf)
        sharpness = 2 + 48 * step / STEPS
        found = F.normalize(found - RATE * (sharpness * cosines).softmax(1) @ found)
    return found
