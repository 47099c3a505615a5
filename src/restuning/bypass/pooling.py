"""What the tokens of a narrow state say together: means, attended values and places, profiles."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from restuning._errors import TunerShapeError
from restuning._grid import count_tokens_before_grid
from restuning.sites import average_tokens, take_one_token
from restuning.tuners import BINS, average_profiles

Token = Literal["cls", "last", "all"]

HEADS, VALUES, CHANNELS, DROPOUT = 8, 8, 8, 0.5
"""Chosen on the validation splits of three tasks: see `docs/mixing.md`."""


class Pooling(nn.Module):
    r"""Tokens `b n w` to a vector `b f`: a token, the mean, attention, and on a grid its profiles.

    *Attention*: each of 8 learned queries weighs the tokens and gives their mean of 8 values, on a
    grid also the mean place. *Profiles*: 8 channels averaged over rows and over columns, in 7 bins
    each, with dropout: where something is, which a mean forgets.

    Args:
        width: w.
        token: The token that stands beside: "cls" (first), "last", "all" (every token has a vector
            of its own, `b n f`), or None.
        grid: Whether the tokens form a square, after the fewest that leave one.

    Shape:
        state: `b n w`; mask: `b n`, true where real.

    Attributes:
        features: f.

    Cost: `2 * w * 8` parameters, with a grid `3 * w * 8`, and 24.

    Raises:
        TunerShapeError: Tokens form no square.
    """

    def __init__(self, width: int, *, token: Token | None = "cls", grid: bool = True) -> None:
        super().__init__()
        self.token: Token | None = token
        self.grid = grid
        self.weigh = nn.Linear(width, HEADS)
        self.value = nn.Linear(width, VALUES)
        self.profile = nn.Linear(width, CHANNELS) if grid else None
        per_head = VALUES + (2 if grid else 0)
        self.features = width * (2 if token else 1) + HEADS * per_head
        self.features += 2 * BINS * CHANNELS if grid else 0

    def forward(self, state: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pool the tokens of a state to one vector (see the class)."""
        rest = state[:, count_tokens_before_grid(state.shape[1]) :] if self.grid else state
        scores, values = self.weigh(rest), self.value(rest)
        if mask is not None:
            # The mask is of all tokens; `rest` is without those that stand before the grid.
            mask = mask[:, -rest.shape[1] :]
            # The least finite number and not -inf: a row of nothing but padding would become nan.
            scores = scores.masked_fill(~mask.unsqueeze(-1), torch.finfo(scores.dtype).min)
        parts = [average_tokens(rest, mask)]
        if self.profile is not None:
            side = math.isqrt(rest.shape[1])
            # Attended like the values, coordinates give the mean place that a query looks at.
            values = torch.cat(
                [values, _make_coordinates(side, values).expand(values.shape[0], -1, -1)], -1
            )
            parts.append(F.dropout(average_profiles(self.profile(rest)), DROPOUT, self.training))
        # `b n 8` weights over tokens, times `b n v`: eight vectors an input.
        parts.append((scores.softmax(1).mT @ values).flatten(1))
        together = torch.cat(parts, 1)
        if self.token is None:
            return together
        if self.token == "all":
            return torch.cat([state, together.unsqueeze(1).expand(-1, state.shape[1], -1)], -1)
        return torch.cat([take_one_token(state, self.token, mask)[:, 0], together], 1)

    def spec(self) -> dict[str, Any]:
        """What it is built from, beside the width."""
        return {"token": self.token, "grid": self.grid}


def pool_patches(stream: Tensor, side: int) -> Tensor:
    """Patches averaged in squares, what stands before the grid as it is: `b n d -> b m d`.

    Args:
        stream: Tokens that form a square after the fewest that leave one.
        side: Patches along a square; where the grid is no multiple of it, the last are smaller.

    Raises:
        TunerShapeError: Tokens form no square, or it is no stream of tokens.
    """
    if side == 1:
        return stream
    if stream.dim() != 3:
        raise TunerShapeError(
            "patches are pooled of streams of tokens",
            found=f"a tap of shape {tuple(stream.shape)}",
            fix="read maps and hierarchies pooled (--tokens auto)",
        )
    first = count_tokens_before_grid(stream.shape[1])
    wide = math.isqrt(stream.shape[1] - first)
    grid = stream[:, first:].mT.unflatten(2, (wide, wide))
    # ceil_mode keeps the last rows and columns where the grid is no multiple of the square.
    means = F.avg_pool2d(grid, side, ceil_mode=True, count_include_pad=False)
    return torch.cat([stream[:, :first], means.flatten(2).mT], 1)


def measure_pooling_loss(stream: Tensor, side: int) -> tuple[float, float]:
    """Sums of squares: of what pooling loses of the patches, and of the patches around their mean.

    Their ratio is the share of the variance inside an image that is lost.

    Args:
        stream: `b n d`.
        side: As for `pool_patches`.
    """
    first = count_tokens_before_grid(stream.shape[1])
    patches, means = stream[:, first:].double(), pool_patches(stream.double(), side)[:, first:]
    wide, narrow = math.isqrt(patches.shape[1]), math.isqrt(means.shape[1])
    square = torch.arange(wide, device=stream.device) // side
    # Each patch's mean, put back where the patch was.
    spread = means.unflatten(1, (narrow, narrow))[:, square][:, :, square].flatten(1, 2)
    deviations = patches - patches.mean(1, keepdim=True)
    return float((patches - spread).square().sum()), float(deviations.square().sum())


def _make_coordinates(side: int, like: Tensor) -> Tensor:
    """Row and column of every token of a grid, from -1 to 1, `1 n 2`."""
    line = torch.linspace(-1, 1, side, dtype=like.dtype, device=like.device)
    return torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).flatten(0, 1).unsqueeze(0)
