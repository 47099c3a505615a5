"""Products that tuners are made of: heads, softmax attention, a delta added in one product."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


def split_heads(x: Tensor, heads: int) -> Tensor:
    """`... n d -> ... h n d/h`."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def merge_heads(y: Tensor) -> Tensor:
    """`... h n e -> ... n h*e`."""
    return y.transpose(-3, -2).flatten(-2)


def add_product(y: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`y + hidden W^T + b` in one product, `(..., d), (..., r), (d, r), (d) -> (..., d)`.

    The bias rides along as one more column of the small factors.
    """
    if hidden.dtype != y.dtype or not y.is_contiguous():
        # A product under autocast would round the stream; a strided one would copy it.
        return y + F.linear(hidden, weight, bias).reshape(y.shape)
    flat = hidden.reshape(-1, hidden.shape[-1])
    if bias is not None:
        flat = torch.cat([flat, flat.new_ones(()).expand(flat.shape[0], 1)], 1)
        weight = torch.cat([weight, bias.unsqueeze(1)], 1)
    return torch.addmm(y.reshape(-1, y.shape[-1]), flat, weight.t()).view(y.shape)


def add_linear(y: Tensor, hidden: Tensor, up: nn.Linear, scale: Tensor | None) -> Tensor:
    """`y + scale * up(hidden)` in one product; the scale is one number a channel, or None for 1."""
    if scale is None:
        return add_product(y, hidden, up.weight, up.bias)
    return add_product(y, hidden, up.weight * scale.unsqueeze(-1), up.bias * scale)


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention and its log-sum-exp, `... h n e -> (... h n e, ... h n 1)`."""
    # Written out: torch's fused attention does not return the log-sum-exp.
    scores = (q * scale) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1) @ v, torch.logsumexp(scores, -1, keepdim=True)
