"""A bottleneck with a depthwise convolution: a tuner that sees a token's neighbours on the grid."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from restuning._errors import TunerShapeError
from restuning._grid import count_tokens_before_grid
from restuning.tuners._base import Tuner, tuner
from restuning.tuners.adapter import start_bottleneck
from restuning.tuners.token_mixing import normalise
from restuning.tuners.view import FrozenAttention


@tuner("conv_adapter")
class ConvAdapter(Tuner):
    r"""`W_up gelu(D * (W_down x))`, D a depthwise convolution on the grid of the stream.

    Args:
        dim: Width d of the stream.
        rank: Width r of the bottleneck.
        kernel: Side k of D, odd.
        prefix: Tokens before the grid in a stream `b n d` (class token, registers), None for the
            fewest that leave a square. They pass D's centre alone, as a grid of one token each
            would.
        norm: Normalise each token first (no parameters); see `LowRankAttention`.
        zero: Start as no change (W_up and its bias zero).

    Shape:
        x: `b h w d`, or `b n d` with n - prefix a square number; returns x's shape.

    Cost: `2*d*r + r*k*k + 2*r + d` parameters, `4*d*r + 2*r*k*k` flops a token.
    Start: D the identity, so that it starts as a Res-Adapter; weights Xavier-uniform, biases
    N(0, 1e-6).
    Reference: not in the paper; the bottleneck is its Res-Adapter, the convolution as in Convpass
    (Jie and Deng 2022, arXiv 2207.07039), depthwise here.

    Raises:
        TunerShapeError: An even kernel, or tokens that form no square grid.
    """

    mixes_tokens = True
    needs_grid = True

    def __init__(
        self,
        dim: int,
        *,
        rank: int = 10,
        kernel: int = 3,
        prefix: int | None = 0,
        norm: bool = False,
        zero: bool = False,
    ) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise TunerShapeError(
                "a convolution that keeps the grid has an odd kernel",
                found=f"kernel={kernel}",
                fix="give 3, 5 or 7",
            )
        self.dim, self.rank, self.kernel, self.prefix = dim, rank, kernel, prefix
        self.norm, self.zero = norm, zero
        self.down = nn.Linear(dim, rank)
        self.depthwise = nn.Conv2d(rank, rank, kernel, padding=kernel // 2, groups=rank)
        self.up = nn.Linear(rank, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the start values; see the class."""
        start_bottleneck(self.down, self.up, self.zero)
        # One in the centre of every kernel: the identity.
        nn.init.dirac_(self.depthwise.weight, groups=self.rank)
        assert self.depthwise.bias is not None
        nn.init.zeros_(self.depthwise.bias)

    def forward(self, x: Tensor, view: FrozenAttention | None = None) -> Tensor:
        """Compute the delta; see the class."""
        hidden = self.down(normalise(x, self.norm))
        if x.dim() == 4:
            return self.up(F.gelu(self._convolve(hidden)))
        prefix = count_tokens_before_grid(x.shape[1], self.prefix)
        first, rest = hidden[:, :prefix], hidden[:, prefix:]
        side = math.isqrt(rest.shape[1])
        # A class token alone has no grid.
        grid = self._convolve(rest.unflatten(1, (side, side))).flatten(1, 2) if side else rest
        if prefix:
            # What padding with zeros would leave of D on a grid of one token.
            centre = self.depthwise.weight[:, 0, self.kernel // 2, self.kernel // 2]
            grid = torch.cat([first * centre + self.depthwise.bias, grid], 1)
        return self.up(F.gelu(grid))

    def _convolve(self, grid: Tensor) -> Tensor:
        """`b h w r -> b h w r`."""
        return self.depthwise(grid.movedim(-1, 1)).movedim(1, -1)
