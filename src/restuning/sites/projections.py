"""The projections of a frozen attention as data, and lent to a tuner for one forward as functions.

What is lent was proved (`prove_projections.py`): recomputing the layer's attention from it gives
what the layer returned, with grouped queries, rotary positions, norms on queries and keys,
relative-position biases, masks, a cache of earlier tokens, and the other sequence of a cross-attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from restuning._errors import ProjectionsError
from restuning._torch import read_whole
from restuning.sites.attention_inputs import AttentionInputs, rotate
from restuning.sites.half import is_wider, run_linear, run_norm, run_product
from restuning.sites.linear import read_bias, read_weight


@dataclass(frozen=True, slots=True)
class Projections:
    """Where W_q, W_k, W_v and W_o of one attention are: module paths and numbers, no tensors.

    Attributes:
        form: "fused" (one qkv map), "separate", or "packed" (`nn.MultiheadAttention`).
        q, k, v, out: Paths of the linear maps; the same path thrice for fused and packed.
        heads: Number h of query heads.
        scale: What multiplies QK^T.
        norm: Path of the attention branch's norm, "" for none (post-norm layers).
        q_norm, k_norm: Paths of norms on q and k, "" for none; on every head if they are as wide
            as one, else on all heads together (OLMo 2).
        causal: Whether the layer masks the future.
        module: Path of the attention itself, where mask and positions pass.
        kv_heads: Number of key and value heads; fewer than `heads` are grouped queries.
        head_dim: Width e of a head.
        rope: Rotary positions: "" for none, "half" or "interleaved".
        direct: Whether W_o's output meets the stream as it is, with no LayerScale or norm between.
        context: Width of the other sequence, where keys and values are made of one; 0 elsewhere.
    """

    form: str
    q: str
    k: str
    v: str
    out: str
    heads: int
    scale: float
    norm: str = ""
    q_norm: str = ""
    k_norm: str = ""
    causal: bool = False
    module: str = ""
    kv_heads: int = 0
    head_dim: int = 0
    rope: str = ""
    direct: bool = True
    context: int = 0

    @classmethod
    def declare(
        cls,
        *,
        q: str,
        k: str = "",
        v: str = "",
        out: str,
        heads: int,
        norm: str = "",
        scale: float = 0.0,
    ) -> Projections:
        """Say where an attention has its projections; for `Branch(projections=...)`.

        Paths are relative to the block. What is left out is measured: widths, groups of keys and
        values, rotary positions and causal masks. Lent only if recomputing the attention from them
        gives what the layer returned, else `Host` raises.

        Args:
            q: The linear map W_q; without `k` and `v` one map that makes all three, in this order.
            k: W_k.
            v: W_v.
            out: W_o.
            heads: Number of query heads.
            norm: The norm between the stream and W_q; "" for the one that ran there, if any.
            scale: What multiplies QK^T; 0 for one over the root of a head's width.
        """
        form = "separate" if k and v else "fused"
        return cls(form, q, k or q, v or q, out, heads, scale, norm)

    @property
    def key_width(self) -> int:
        """Width of all key heads side by side: what a learned key is wide."""
        return self.kv_heads * self.head_dim


class LentProjections:
    """The projections as functions, for one forward: the `FrozenAttention` that tuners are given.

    Letters: `h` query heads, `e` width of a head.
    """

    def __init__(
        self, model: nn.Module, projections: Projections, inputs: AttentionInputs | None = None
    ) -> None:
        self.projections, self.heads, self.scale = projections, projections.heads, projections.scale
        self._modules = {
            path: model.get_submodule(path)
            for path in (
                projections.q,
                projections.k,
                projections.v,
                projections.out,
                projections.norm,
                projections.q_norm,
                projections.k_norm,
            )
            if path
        }
        self._inputs = inputs

    def of(self, model: nn.Module) -> LentProjections:
        """The same projections of a copy of the model."""
        return LentProjections(model, self.projections, self._inputs)

    def with_inputs(self, inputs: AttentionInputs) -> LentProjections:
        """The same projections in a forward whose attention was given this."""
        # A shallow copy: modules are not looked up again in every forward.
        copy = object.__new__(LentProjections)
        copy.__dict__.update(self.__dict__, _inputs=inputs)
        return copy

    def norm(self, x: Tensor) -> Tensor:
        """The attention branch's own norm."""
        return run_norm(self._modules[self.projections.norm], x) if self.projections.norm else x

    def q(self, x: Tensor) -> Tensor:
        """W_q x, turned to the tokens' positions, `... n d -> ... h n e`."""
        return self._rotate(self._project(x, 0))

    def k(self, x: Tensor) -> Tensor:
        """W_k x of tokens without a position (position 0), `... n d -> ... h n e`."""
        return self._repeat_key_heads(self._project(x, 1))

    def v(self, x: Tensor) -> Tensor:
        """W_v x, `... n d -> ... h n e`."""
        return self._repeat_key_heads(self._project(x, 2))

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What the layer itself attends to in this forward, `b n d -> b h m e` each.

        Its own tokens at their positions after those in the cache, or the other sequence.
        """
        inputs = self._inputs or AttentionInputs()
        if inputs.context is not None:
            context = inputs.context.to(tokens.dtype)
            return self.k(context), self.v(context)
        if inputs.past is not None and inputs.whole:
            # The layer has written this forward's keys into the buffer by now.
            keys, values = (part.to(tokens.dtype) for part in inputs.past)
        else:
            keys, values = self._rotate(self._project(tokens, 1)), self._project(tokens, 2)
            if inputs.past is not None:
                past = [part.to(tokens.dtype) for part in inputs.past]
                keys = torch.cat([past[0], keys], -2)
                values = torch.cat([past[1], values], -2)
        return self._repeat_key_heads(keys), self._repeat_key_heads(values)

    def split(self, x: Tensor) -> Tensor:
        """Learned keys or values as heads, `... r key_width -> ... h r e`."""
        return self._repeat_key_heads(
            x.unflatten(-1, (self.projections.kv_heads, -1)).transpose(-3, -2)
        )

    def out(self, y: Tensor) -> Tensor:
        """W_o without its bias, `... h n e -> ... n d`."""
        # Without the bias, which the layer itself has added once.
        return F.linear(y.transpose(-3, -2).flatten(-2), self._out_weight().to(y.dtype))

    def fold(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor | None, Tensor] | None:
        """`h r e` keys and values as two maps `h*r d` around a softmax: `FrozenAttention.fold`."""
        # Folding pays for few tokens, and is right where nothing stands between W_q and the scores.
        tokens = keys.shape[-2] * self.heads
        weight, bias = self._read_weight_and_bias(0)
        if (
            self.projections.q_norm
            or self.projections.rope
            or tokens >= weight.shape[-1]
            or weight.dim() != 2
        ):
            return None
        if is_wider(keys, weight):
            weight = weight.to(keys.dtype)
            bias = None if bias is None else bias.to(keys.dtype)
        # Into the small factor, not into the scores of every token.
        keys = keys * self.scale
        into = (keys @ weight.unflatten(0, (self.heads, -1))).flatten(0, 1)
        shift = None
        if bias is not None:
            shift = (keys @ bias.view(self.heads, -1, 1)).flatten()
        out = self._out_weight()
        out = out.to(values.dtype) if is_wider(values, out) else out
        mixed = values @ out.unflatten(1, (self.heads, -1)).permute(1, 2, 0)
        return into, shift, mixed.flatten(0, 1)

    def mask(self, queries: Tensor, keys: Tensor) -> Tensor | None:
        """What the layer adds to its scores, `b|1 h|1 n m`: masks and relative positions."""
        inputs = self._inputs or AttentionInputs()
        # The least number, not minus infinity: a row that sees nothing must not become NaN.
        least = torch.finfo(queries.dtype).min
        n, m = queries.shape[-2], keys.shape[-2]
        added = inputs.mask
        if added is not None:
            added = added[..., :m]
            if added.dtype == torch.bool:
                added = torch.zeros_like(added, dtype=queries.dtype).masked_fill(~added, least)
        elif self.projections.causal and n > 1:
            # Queries are the last n of m tokens.
            added = queries.new_full((n, m), least).triu(1 + m - n)
        if inputs.bias is None:
            return added
        return inputs.bias if added is None else (added + inputs.bias).clamp(min=least)

    def _read_weight_and_bias(self, third: int) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of W_q, W_k or W_v."""
        projections = self.projections
        module: Any = self._modules[(projections.q, projections.k, projections.v)[third]]
        if projections.form == "separate":
            return read_weight(module), read_bias(module)
        packed = projections.form == "packed"
        if packed:
            weight, bias = read_whole(module.in_proj_weight), module.in_proj_bias
            bias = None if bias is None else read_whole(bias)
        else:
            weight, bias = read_weight(module), read_bias(module)
        # Rows of a fused weight: all queries, then all keys, then all values.
        queries = projections.heads * projections.head_dim
        start, width = (
            (0, queries),
            (queries, projections.key_width),
            (queries + projections.key_width, projections.key_width),
        )[third]
        part = slice(start, start + width)
        return weight[part], None if bias is None else bias[part]

    def _project(self, x: Tensor, third: int) -> Tensor:
        projections = self.projections
        heads = projections.heads if third == 0 else projections.kv_heads
        norm = self._modules.get((projections.q_norm, projections.k_norm, "")[third])
        if projections.form == "separate":
            y = run_linear(self._modules[(projections.q, projections.k, projections.v)[third]], x)
        else:
            y = run_product(x, *self._read_weight_and_bias(third))
        weight = getattr(norm, "weight", None)
        # The weight's width tells a norm of each head (Qwen 3) from one of all heads (OLMo 2).
        a_head = weight is None or weight.numel() == projections.head_dim
        if norm is not None and not a_head:
            y = run_norm(norm, y)
        y = y.unflatten(-1, (heads, -1)).transpose(-3, -2)
        return run_norm(norm, y) if norm is not None and a_head else y

    def _rotate(self, y: Tensor) -> Tensor:
        if not self.projections.rope:
            return y
        if self._inputs is None or self._inputs.rope is None:
            raise ProjectionsError(
                "a layer's rotary positions are not known outside its forward",
                where=self.projections.module,
                fix="use them while the backbone runs: Tuned(host, task)(x) or host.using(task)",
            )
        return rotate(y, self._inputs.rope, self.projections.rope)

    def _repeat_key_heads(self, y: Tensor) -> Tensor:
        groups = self.projections.heads // self.projections.kv_heads
        # Consecutive query heads share a key head.
        return y if groups == 1 else y.repeat_interleave(groups, -3)

    def _out_weight(self) -> Tensor:
        module: Any = self._modules[self.projections.out]
        return read_weight(module.out_proj if self.projections.form == "packed" else module)
