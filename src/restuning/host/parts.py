"""Parts of a tap: what its tokens say together, in a few rows that are small to store."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from restuning._grid import count_tokens_before_grid
from restuning.sites import ONE_TOKEN, take_one_token
from restuning.sites.readout import fit_mask
from restuning.tuners import BINS, average_profiles


def compute_part(part: str, stream: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""A part of a tap, `b n d -> b k d`, of tokens that are normalised (no parameters).

    "tokens": mean, largest value and deviation of each channel over real tokens. "patches": the same over
    the grid, without what stands before it. "places": the means along rows and along columns of the grid,
    7 bins each. "cls" and "last": the first or the last real token, as it is.

    Args:
        part: One of `sites.PARTS`.
        stream: `b n d`, or maps `b h w d`, whose places are tokens.
        mask: Which tokens are real, `b n`; None where all are.

    Raises:
        TunerShapeError: There is no grid where one is asked for.
    """
    if part in ONE_TOKEN:
        # A slice would hold the whole stream in memory; a copy of one token lets it go.
        return take_one_token(stream, part, mask).clone()
    # In single precision: sums of squares of half precision lose what they are for.
    normed = F.layer_norm(stream.float(), stream.shape[-1:]).flatten(1, -2)
    if part != "tokens":
        normed = normed[:, count_tokens_before_grid(normed.shape[1]) :]
    if part == "places":
        # Means over rows first, then over columns, each bin a row of the result: `b 2*7 d`.
        found = average_profiles(normed).unflatten(1, (2, -1, BINS)).mT.flatten(1, 2)
    else:
        found = _describe_tokens(normed, None if part == "patches" else mask)
    return found.to(stream.dtype)


def _describe_tokens(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Mean, largest value and deviation over real tokens, `b n d -> b 3 d`."""
    if mask is None:
        mean, largest = tokens.mean(1), tokens.amax(1)
        spread = (tokens - mean.unsqueeze(1)).square().mean(1)
    else:
        real = fit_mask(mask, tokens).unsqueeze(-1)
        count = real.sum(1).clamp(min=1)
        # What a backbone leaves at padding may be anything, also NaN.
        mean = torch.where(real, tokens, 0.0).sum(1) / count
        spread = torch.where(real, tokens - mean.unsqueeze(1), 0.0).square().sum(1) / count
        largest = torch.where(real, tokens, -torch.inf).amax(1)
        # Of a row of nothing but padding there is no largest.
        largest = torch.where(real.any(1), largest, 0.0)
    return torch.stack([mean, largest, spread.sqrt()], 1)
