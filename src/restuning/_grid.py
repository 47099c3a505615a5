"""Where patches stand: the square grid at the end of a stream of tokens."""

from __future__ import annotations

import math

from torch import Tensor

from restuning._errors import TunerShapeError

MOST_PREFIX_TOKENS = 6
"""Class, distillation and up to four register tokens stand before the grid in known families."""


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


def to_grid(stream: Tensor) -> Tensor:
    """The patches of a stream where they stand, `b n d -> b h w d`; of maps the stream itself.

    Raises:
        TunerShapeError: Tokens form no square.
    """
    if stream.dim() == 4:
        return stream
    patches = stream[:, count_tokens_before_grid(stream.shape[1]) :]
    side = math.isqrt(patches.shape[1])
    return patches.unflatten(1, (side, side))
