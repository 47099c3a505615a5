"""Patches to a finer grid: what a narrow state and the taps themselves say of the parts of each patch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from restuning._errors import TunerShapeError
from restuning._grid import to_grid
from restuning.tuners import ConvAdapter

PARTS = 4
"""Along the side of a patch: of 16 pixels each is 4."""

CHANNELS, KERNEL, LAYERS = 32, 5, 2
STD = 0.02
"""Of a new head's weights."""


class Finer(nn.Module):
    r"""`b n w` and taps `b n d_k` to `b kh kw 32`: `s + conv_1(s)`, then `s + conv_2(s)`, of `s = spread(W [x, taps])`.

    A head on patches draws edges no finer than these are, though their tokens know more. W makes of each patch its k by k
    parts, of 32 numbers each (a sub-pixel convolution, Shi et al. 2016); convolutions of 5 by 5, which start as no
    change, mend the seams.

    Args:
        width: w.
        dims: Widths of the taps, which are normalised first (no parameters).
        factor: k.

    Shape:
        state, taps: patches on a square grid after the fewest tokens that leave one.

    Attributes:
        features: 32.

    Cost: `32 k^2 (w + sum_k d_k)` parameters; a step holds about 300 numbers for each part of a patch.

    Raises:
        TunerShapeError: The factor is below 1.
    """

    def __init__(self, width: int, dims: Sequence[int], factor: int = PARTS) -> None:
        super().__init__()
        if factor < 1:
            raise TunerShapeError(
                "patches have parts", found=f"factor={factor}", fix="give 1 or more"
            )
        self.factor, self.features = factor, CHANNELS
        self.spread = nn.Linear(width + sum(dims), factor**2 * CHANNELS)
        self.mend = nn.ModuleList(
            ConvAdapter(CHANNELS, rank=2 * CHANNELS, kernel=KERNEL, norm=True, zero=True)
            for _ in range(LAYERS)
        )

    def forward(self, state: Tensor, taps: Sequence[Tensor]) -> Tensor:
        """The finer grid (see the class)."""
        normed = (F.layer_norm(tap.to(state.dtype), tap.shape[-1:]) for tap in taps)
        parts = self.spread(torch.cat([to_grid(each) for each in (state, *normed)], -1))
        fine = F.pixel_shuffle(parts.movedim(-1, 1), self.factor).movedim(1, -1)
        for convolve in self.mend:
            fine = fine + convolve(fine)
        return fine

    def make_head(self, outputs: int) -> nn.Linear:
        """A new head on it."""
        head = nn.Linear(self.features, outputs)
        nn.init.trunc_normal_(head.weight, std=STD)
        nn.init.zeros_(head.bias)
        return head

    def spec(self) -> dict[str, Any]:
        """What it is built from, beside the widths."""
        return {"factor": self.factor}
