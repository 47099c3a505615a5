"""From one stage of a hierarchy to the next: another grid, another width."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

RANK = 64
"""Channels between two stages: ResNet-50 would otherwise spend 2.7 million parameters there."""


class Resample(nn.Module):
    """Fits a state to the next stage of a hierarchy: `pool(x) W`, average pooling over the grid.

    Args:
        dim: Width of the state.
        to: Width of the next stage.

    Shape:
        x: `b h w d` or `b n d`; like: the next tap. Returns a tensor of like's shape.

    Cost: W has `dim * to + to` parameters, or, where that is less, goes through 64 channels.
    """

    def __init__(self, dim: int, to: int) -> None:
        super().__init__()
        whole = nn.Linear(dim, to)
        thin = RANK * (dim + to) < dim * to
        self.width: nn.Module = whole if not thin else nn.Sequential(
            nn.Linear(dim, RANK, bias=False), nn.Linear(RANK, to)
        )  # fmt: skip

    def forward(self, x: Tensor, like: Tensor) -> Tensor:
        """Pool tokens to like's grid, then map the width."""
        return self.width(on_grid(x, like.shape[1:-1]))


def on_grid(x: Tensor, grid: Sequence[int]) -> Tensor:
    """Average pooling of a state to a grid, `b h w d` or `b n d`; itself where it is on it."""
    if tuple(x.shape[1:-1]) == tuple(grid):
        return x
    if x.dim() == 4:
        pooled = F.adaptive_avg_pool2d(x.movedim(-1, 1), (grid[0], grid[1]))
        return pooled.movedim(1, -1)
    side, to = int(x.shape[1] ** 0.5), int(grid[0] ** 0.5)
    if side**2 == x.shape[1] and to**2 == grid[0]:
        return F.adaptive_avg_pool2d(x.mT.unflatten(-1, (side, side)), to).flatten(2).mT
    return F.adaptive_avg_pool1d(x.mT, grid[0]).mT
