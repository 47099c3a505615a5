"""Res-Prefix: the layer's queries attend to learned keys and values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from restuning.tuners._base import tuner
from restuning.tuners.learned_tokens import AttentionTuner, Query, require_attention
from restuning.tuners.products import split_heads
from restuning.tuners.view import FrozenAttention


@tuner("res_prefix")
class ResPrefix(AttentionTuner):
    r"""Prefix tuning, unbound: `OP(x) + Attn(Q, K_pre, V_pre) W_o`, Q and W_o the layer's own.

    Args:
        dim: Width d of the stream.
        length: Number r of prefix tokens. The paper uses 10 in every layer.
        query: "mha" or "stream"; see `AttentionTuner`.
        heads: Heads for `query="stream"`; with "mha" the layer's own number is used.
        width: Width of a key and a value, where it is not d: `site.projections.key_width` of layers
            with grouped queries or heads of their own size. None is d.
        zero: Start as no change (V_pre zero).

    Shape:
        x: `(*b, n, d) -> (*b, n, d)`.

    Keys stand at no position, as those that a cache is filled with: in layers with rotary positions
    the queries are turned, the prefix is not.

    Cost: `2*r*d` parameters, `2*d*d + 4*r*d` flops a token with "mha" (Q and W_o), else `4*r*d`.
    Start: Xavier-uniform, as in the authors' code.
    Reference: arXiv 2310.19859, Fig. 3(a) and appendix; `Scaled(form="exact")` gives the identity
    with the embedded original, this plain form replaces its lambda by a learned scale.
    """

    def __init__(
        self,
        dim: int,
        *,
        length: int = 10,
        query: Query = "mha",
        heads: int = 1,
        zero: bool = False,
        width: int | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.length, self.heads, self.zero, self.width = dim, length, heads, zero, width
        self.query: Query = query
        self.k = nn.Parameter(torch.empty(length, width or dim))
        self.v = nn.Parameter(torch.empty(length, width or dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the start values; see the class."""
        nn.init.xavier_uniform_(self.k)
        nn.init.xavier_uniform_(self.v)
        # Zero values are enough: keys must differ, or all would get the same gradient.
        if self.zero:
            nn.init.zeros_(self.v)

    def keys_values(self, view: FrozenAttention | None) -> tuple[Tensor, Tensor]:
        """The prefix, split into heads."""
        if self.query == "stream":
            return split_heads(self.k, self.heads), split_heads(self.v, self.heads)
        attention = require_attention(view, self)
        return attention.split(self.k), attention.split(self.v)
