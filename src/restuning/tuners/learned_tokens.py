"""What Res-Prefix and Res-Prompt share: queries of the layer attend to a few learned tokens."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from restuning._errors import ProjectionsError
from restuning.tuners._base import Tuner, trait
from restuning.tuners.products import add_product, attend, merge_heads, split_heads
from restuning.tuners.view import FrozenAttention

Query = Literal["mha", "stream"]


class AttentionTuner(Tuner):
    """`W_o Attn(Q, K_t, V_t)` over `length` learned tokens t; abstract.

    `query="mha"` (default) borrows the frozen W_q, W_k, W_v, W_o and norm of the layer's own
    attention, also at FFN and block sites: the paper's figure draws a frozen Q box and names an
    MHA box, and gives no other source of Q. `query="stream"` uses the stream itself as Q and no
    frozen map, so it runs on any backbone. Which the paper uses at FFN and block is not known.
    """

    query: Query
    heads: int
    length: int

    @trait
    def needs_view(self) -> bool:
        """Frozen projections are needed unless the stream itself is the query."""
        return self.query == "mha"

    @abstractmethod
    def keys_values(self, view: FrozenAttention | None) -> tuple[Tensor, Tensor]:
        """K_t and V_t of the learned tokens, each `h r d/h`."""

    def attend_to_tokens(
        self, x: Tensor, view: FrozenAttention | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Q, `Attn(Q, K_t, V_t)` and its log-sum-exp, per head.

        Raises:
            ProjectionsError: `query="mha"` and the site lends no projections.
        """
        keys, values = self.keys_values(view)
        if self.query == "stream":
            queries = split_heads(x, self.heads)
            scale = (self.dim // self.heads) ** -0.5
        else:
            attention = require_attention(view, self)
            queries, scale = attention.q(attention.norm(x)), attention.scale
        # No mask: learned tokens stand before the sequence, where every token sees them.
        mixed, lse = attend(queries, keys, values, scale)
        return queries, mixed, lse

    def forward(self, x: Tensor, view: FrozenAttention | None = None) -> Tensor:
        """Compute the delta; see the class."""
        if (folded := self._fold(x, view)) is not None:
            weights, out = folded
            return weights @ out
        _, mixed, _ = self.attend_to_tokens(x, view)
        return (
            merge_heads(mixed)
            if self.query == "stream"
            else require_attention(view, self).out(mixed)
        )

    def scaled(self, x: Tensor, view: FrozenAttention | None, scale: Tensor) -> Tensor:
        """`scale * tuner(x)` with the scale folded into the last product where there is one."""
        if (folded := self._fold(x, view)) is None:
            return super().scaled(x, view, scale)
        weights, out = folded
        return weights @ (out * scale)

    def added(
        self, y: Tensor, x: Tensor, view: FrozenAttention | None = None, scale: Tensor | None = None
    ) -> Tensor:
        """`y + scale * tuner(x)`, as one product where the maps fold."""
        if (folded := self._fold(x, view)) is None:
            return super().added(y, x, view, scale)
        weights, out = folded
        # `add_product` takes a weight as a linear map keeps it, `d h*r`.
        return add_product(y, weights, (out if scale is None else out * scale).t(), None)

    def _fold(self, x: Tensor, view: FrozenAttention | None) -> tuple[Tensor, Tensor] | None:
        """Attention weights `... n h*r` and what they mix, `h*r d`; None where nothing folds."""
        if self.query == "stream":
            return None
        attention = require_attention(view, self)
        maps = attention.fold(*self.keys_values(view))
        if maps is None:
            return None
        into, shift, out = maps
        # `b n h*r`: one product in place of W_q and of every head's own.
        scores = F.linear(attention.norm(x), into, shift).unflatten(-1, (attention.heads, -1))
        return scores.softmax(-1).flatten(-2), out


def require_attention(view: FrozenAttention | None, tuner: Tuner) -> FrozenAttention:
    """The layer's attention as it was lent, or an error that says how to get it."""
    if view is None:
        raise ProjectionsError(
            f"{tuner.kind} needs the projections of its layer's attention",
            found="this site lends none (they could not be proved, or there is no attention)",
            fix='use query="stream", or declare them: Host(model, x, sites=Sites.declare(...))',
        )
    return view
