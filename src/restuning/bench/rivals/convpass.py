"""Convpass: a bottleneck with a convolution beside MHA and FFN."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from restuning._errors import TunerShapeError
from restuning.bench.rivals.inside import add_in_parallel
from restuning.host import Host

WIDTH = 8
"""Channels of the bottleneck (Jie and Deng 2022, section 4.1)."""

DROPOUT = 0.1
"""Dropout before the last map, as in the authors' code."""


def quick_gelu(x: Tensor) -> Tensor:
    """`x sigmoid(1.702 x)`, as in the authors' code."""
    return x * torch.sigmoid(1.702 * x)


class Convpass(nn.Module):
    """`W_up phi(C * phi(W_down x))`, C a 3 x 3 convolution on the grid of patches.

    Args:
        dim: Width d.
        width: Channels h of the bottleneck.
        prefix: Tokens before the grid, each convolved as a grid of its own.

    Shape:
        `b n d -> b n d`, n - prefix a square number.

    Cost: `2 d h + h + d + 9 h h + h` parameters: 13,648 for d 768 and h 8, 327,552 for the 24 of
    ViT-B/16, printed as 0.33 M.
    Start: W_up zero, C the identity: no change.
    Reference: Jie and Deng 2022, arXiv 2207.07039.

    Raises:
        TunerShapeError: Tokens form no square grid.
    """

    def __init__(self, dim: int, width: int = WIDTH, prefix: int = 1) -> None:
        super().__init__()
        self.prefix = prefix
        self.down, self.up = nn.Linear(dim, width), nn.Linear(width, dim)
        self.convolution = nn.Conv2d(width, width, 3, padding=1)
        self.dropout = nn.Dropout(DROPOUT)
        nn.init.xavier_uniform_(self.down.weight)
        # Identity and zero, as published: the backbone's own output at the start.
        nn.init.dirac_(self.convolution.weight)
        for zero in (self.down.bias, self.up.weight, self.up.bias, self.convolution.bias):
            nn.init.zeros_(zero)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """The addition to an operation's output."""
        hidden = quick_gelu(self.down(x))
        # Class and register tokens have no place on the grid.
        first, rest = hidden[:, : self.prefix], hidden[:, self.prefix :]
        side = math.isqrt(rest.shape[1])
        if side * side != rest.shape[1]:
            raise TunerShapeError(
                "tokens form no square grid",
                where="convpass",
                found=f"{x.shape[1]} tokens, {self.prefix} before the grid",
                fix="set prefix to the number of class and register tokens",
            )
        # `b n h` to `b h side side`.
        grid = self.convolution(rest.unflatten(1, (side, side)).movedim(-1, 1))
        # A grid of one token meets the kernel's centre only.
        centre = self.convolution.weight[:, :, 1, 1]
        first = functional.linear(first, centre, self.convolution.bias)
        both = torch.cat([first, grid.flatten(2).mT], 1)
        return self.up(self.dropout(quick_gelu(both)))


def convpass(model: nn.Module, host: Host, options: dict[str, Any]) -> nn.Module:
    """Convpass beside MHA and FFN, after the norm, with s 1.

    The authors choose s from 0.01 to 100 on each task; `--set convpass:scale=0.1,1,10` does.

    Options: `rank` (channels of the bottleneck), `scale`, `prefix` (tokens before the grid).
    """
    width, prefix = options.get("rank", WIDTH), options.get("prefix", 1)
    return add_in_parallel(
        model, host, lambda dim: Convpass(dim, width, prefix), options.get("scale", 1.0)
    )
