"""Where patches stand: the square grid at the end of a stream of tokens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from restuning._errors import TunerShapeError

MOST_PREFIX_TOKENS = 6
"""Class, distillation and up to four register tokens stand before the grid in known families."""

BINS = 7
"""Of a profile along rows or columns. Chosen on the validation splits of three tasks: `docs/mixing.md`."""


def count_tokens_before_grid(tokens: int, prefix: int | None = None) -> int:
    """How many tokens stand before a square grid: the number given, or the fewest that leave one.

    Raises:
        TunerShapeError: The rest forms no square.
    """
    counts = range(MOST_PREFIX_TOKENS + 1) if prefix is None else [prefix]
    for count in counts:
        rest = tokens - count
        if rest >= 0 and math.isqrt(rest) ** 2 == rest:
            return count
    raise TunerShapeError(
        "tokens form no square grid",
        found=f"{tokens} tokens, {counts[0]} to {counts[-1]} of them before the grid",
        fix="set prefix to the number of class and register tokens",
    )


def average_profiles(tokens: Tensor) -> Tensor:
    """Means along the rows and along the columns of a square grid, `b n c -> b 2*7*c`."""
    side = math.isqrt(tokens.shape[1])
    channels = tokens.transpose(1, 2).unflatten(2, (side, side))
    return torch.cat(
        [F.adaptive_avg_pool1d(channels.mean(axis), BINS).flatten(1) for axis in (2, 3)], 1
    )
