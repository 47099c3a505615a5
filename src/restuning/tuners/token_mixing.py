"""Tuners that see other tokens: low-rank attention, and a bottleneck with the mean as context."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from restuning._errors import TunerShapeError
from restuning.tuners._base import Tuner, tuner
from restuning.tuners.adapter import start_bottleneck
from restuning.tuners.context import attention_mask, average_real_tokens
from restuning.tuners.products import add_linear, merge_heads, split_heads
from restuning.tuners.view import FrozenAttention


def normalise(x: Tensor, norm: bool) -> Tensor:
    """Each token with mean 0 and variance 1, if asked for."""
    return F.layer_norm(x, x.shape[-1:]) if norm else x


@tuner("low_rank_attention")
class LowRankAttention(Tuner):
    r"""`softmax(Q K^T / sqrt(r/h)) V W_o`, with Q, K, V = `norm(x) W` of width r.

    Args:
        dim: Width d of the stream.
        rank: Width r of queries, keys and values, all heads together.
        heads: Heads h that divide r.
        norm: Normalise each token first (no parameters). Streams of pretrained transformers grow
            from layer to layer and have a few large channels, on which fresh maps start saturated.
        zero: Start as no change (W_o and its bias zero).

    Shape:
        x: `(*b, n, d) -> (*b, n, d)`. Padding is seen by no token.

    Cost: `4*d*r + 3*r + d` parameters; `8*d*r + 4*n*r` flops a token.
    Start: Xavier-uniform weights, biases N(0, 1e-6), as a Res-Adapter's.
    Reference: not in the paper; the attention of LAST (Tang et al. 2024, arXiv 2402.04009).

    Raises:
        TunerShapeError: Heads do not divide the rank.
    """

    mixes_tokens = True

    def __init__(
        self, dim: int, *, rank: int = 16, heads: int = 1, norm: bool = True, zero: bool = False
    ) -> None:
        super().__init__()
        if rank % heads:
            raise TunerShapeError(
                "heads must divide the width of attention",
                found=f"rank={rank}, heads={heads}",
                fix="give a rank that is a multiple of heads",
            )
        self.dim, self.rank, self.heads, self.norm, self.zero = dim, rank, heads, norm, zero
        self.qkv = nn.Linear(dim, 3 * rank)
        self.up = nn.Linear(rank, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the start values; see the class."""
        start_bottleneck(self.qkv, self.up, self.zero)

    def forward(self, x: Tensor, view: FrozenAttention | None = None) -> Tensor:
        """Compute the delta; see the class."""
        return self.up(self._mix(x))

    def added(
        self, y: Tensor, x: Tensor, view: FrozenAttention | None = None, scale: Tensor | None = None
    ) -> Tensor:
        """`y + scale * tuner(x)` as one product from the attention's output."""
        return add_linear(y, self._mix(x), self.up, scale)

    def _mix(self, x: Tensor) -> Tensor:
        """`... n d -> ... n r`."""
        queries, keys, values = (
            split_heads(part, self.heads) for part in self.qkv(normalise(x, self.norm)).chunk(3, -1)
        )
        # A map (`b h w d`) has no padding.
        seen = attention_mask(x) if x.dim() == 3 else None
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen)
        return merge_heads(mixed)


@tuner("context_adapter")
class ContextAdapter(Tuner):
    r"""`W_up gelu(W_down x + W_all mean(x))`: a Res-Adapter that also reads the mean of all tokens.

    Args:
        dim: Width d of the stream.
        rank: Width r of the bottleneck.
        zero: Start as no change (W_up and its bias zero).

    Shape:
        x: `(*b, n, d) -> (*b, n, d)`. The mean is over real tokens.

    Cost: `3*d*r + r + d` parameters, `4*d*r` flops a token.
    Start: Xavier-uniform weights, biases N(0, 1e-6).
    Reference: not in the paper; global context as in squeeze-and-excitation (Hu et al. 2018),
    added instead of multiplied.
    """

    mixes_tokens = True

    def __init__(self, dim: int, *, rank: int = 10, zero: bool = False) -> None:
        super().__init__()
        self.dim, self.rank, self.zero = dim, rank, zero
        self.down = nn.Linear(dim, rank)
        # The bottleneck has a bias already.
        self.all = nn.Linear(dim, rank, bias=False)
        self.up = nn.Linear(rank, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the start values; see the class."""
        start_bottleneck(self.down, self.up, self.zero)
        nn.init.xavier_uniform_(self.all.weight)

    def forward(self, x: Tensor, view: FrozenAttention | None = None) -> Tensor:
        """Compute the delta; see the class."""
        return self.up(F.gelu(self.down(x) + self.all(average_real_tokens(x))))
