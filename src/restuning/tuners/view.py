"""The frozen attention of one layer, as a tuner sees it."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class FrozenAttention(Protocol):
    """The frozen attention of one layer, lent to a tuner for one forward and never kept."""

    heads: int
    scale: float

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values that the layer itself attends to in this forward, `b h m d/h` each."""
        ...

    def split(self, x: Tensor) -> Tensor:
        """Learned keys or values as heads, `... r w -> ... h r d/h`; w is the layer's key width."""
        ...

    def norm(self, x: Tensor) -> Tensor:
        """The attention branch's own norm, `b n d -> b n d`."""
        ...

    def q(self, x: Tensor) -> Tensor:
        """W_q x split into heads, turned to its tokens' positions, `... n d -> ... h n d/h`."""
        ...

    def k(self, x: Tensor) -> Tensor:
        """W_k x split into heads, at no position, `... n d -> ... h n d/h`."""
        ...

    def v(self, x: Tensor) -> Tensor:
        """W_v x split into heads, `... n d -> ... h n d/h`."""
        ...

    def out(self, y: Tensor) -> Tensor:
        """W_o on merged heads, without its bias: `b h n d/h -> b n d`."""
        ...

    def fold(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor | None, Tensor] | None:
        """Attention to a few fixed tokens as two maps around a softmax per head, or None.

        `Q K^T = norm(x) A^T + a` and `softmax(...) V W_o = softmax(...) B`, where A and B are
        `h*r d` and a is `h*r`: W_q and W_o then never touch the stream. None where a norm stands
        between W_q and the scores.
        """
        ...

    def mask(self, queries: Tensor, keys: Tensor) -> Tensor | None:
        """What the layer itself adds to its attention scores in this forward, or None."""
        ...
