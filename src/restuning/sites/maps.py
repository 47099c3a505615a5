"""The frozen attention maps of a layer, found by structure, proved by one forward, lent as a view.

A proof recomputes the layer's attention from the maps and compares it with what the layer
returned. What cannot be proved is not lent: relative-position biases, rotary embeddings and
grouped queries need rows of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from restuning.sites.linear import is_linear, weight_of

PROOF_TOLERANCE = 1e-4
"""Largest error of the recomputed attention, relative to its maximum: fp32 fused kernels differ
from plain softmax by about 1e-6."""

_FUSED = ("qkv", "in_proj", "query_key_value", "Wqkv", "c_attn")
_SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("to_q", "to_k", "to_v"),
    ("q_lin", "k_lin", "v_lin"),
)
_OUT = ("out_proj", "o_proj", "proj", "output.dense", "to_out.0", "dense", "c_proj", "out_lin", "o")


@dataclass(frozen=True, slots=True)
class Maps:
    """Where the maps of one layer are: module paths and numbers, no tensors.

    Attributes:
        form: "fused" (one qkv map), "separate", or "packed" (`nn.MultiheadAttention`).
        q, k, v, out: Paths of the maps; the same path thrice for fused and packed.
        heads: Number of heads.
        scale: What multiplies QK^T.
        norm: Path of the attention branch's norm, "" for none (post-norm layers).
        q_norm, k_norm: Paths of norms on each head's q and k, "" for none.
        causal: Whether the layer masks the future.
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


class LentMaps:
    """The maps as functions, for one forward (the `View` that tuners are given)."""

    def __init__(self, model: nn.Module, maps: Maps, given_mask: Tensor | None = None) -> None:
        self.maps, self.heads, self.scale = maps, maps.heads, maps.scale
        self._of = {
            path: model.get_submodule(path)
            for path in (maps.q, maps.k, maps.v, maps.out, maps.norm, maps.q_norm, maps.k_norm)
            if path
        }
        self._mask = given_mask

    def masked(self, mask: Tensor | None) -> LentMaps:
        """The same maps in a forward that was given a mask."""
        lent = object.__new__(LentMaps)
        lent.__dict__.update(self.__dict__, _mask=mask)
        return lent

    def norm(self, x: Tensor) -> Tensor:
        """The attention branch's own norm."""
        return self._of[self.maps.norm](x) if self.maps.norm else x

    def _map(self, x: Tensor, path: str, third: int, head_norm: str = "") -> Tensor:
        module: Any = self._of[path]
        if self.maps.form == "separate":
            y = module(x)
        else:
            packed = self.maps.form == "packed"
            weight = module.in_proj_weight if packed else weight_of(module)
            bias = module.in_proj_bias if packed else module.bias
            part = slice(third * weight.shape[0] // 3, (third + 1) * weight.shape[0] // 3)
            y = F.linear(x, weight[part], None if bias is None else bias[part])
        y = y.unflatten(-1, (self.heads, -1)).transpose(-3, -2)
        return self._of[head_norm](y) if head_norm else y

    def q(self, x: Tensor) -> Tensor:
        """W_q x, `... n d -> ... h n e`."""
        return self._map(x, self.maps.q, 0, self.maps.q_norm)

    def k(self, x: Tensor) -> Tensor:
        """W_k x, `... n d -> ... h n e`."""
        return self._map(x, self.maps.k, 1, self.maps.k_norm)

    def v(self, x: Tensor) -> Tensor:
        """W_v x, `... n d -> ... h n e`."""
        return self._map(x, self.maps.v, 2)

    def out(self, y: Tensor) -> Tensor:
        """W_o without its bias, `... h n e -> ... n d`."""
        module: Any = self._of[self.maps.out]
        weight = module.out_proj.weight if self.maps.form == "packed" else weight_of(module)
        return F.linear(y.transpose(-3, -2).flatten(-2), weight)

    def fold(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor | None, Tensor] | None:
        """`h r e` keys and values as maps `h*r d` around a softmax; see the tuners' `View`."""
        tokens = keys.shape[-2] * self.heads
        module: Any = self._of[self.maps.q]
        packed = self.maps.form == "packed"
        weight = module.in_proj_weight if packed else weight_of(module)
        if self.maps.q_norm or tokens >= weight.shape[-1] or weight.dim() != 2:
            return None
        bias = module.in_proj_bias if packed else module.bias
        if self.maps.form != "separate":
            weight = weight[: weight.shape[0] // 3]
            bias = None if bias is None else bias[: bias.shape[0] // 3]
        keys = keys * self.scale
        per_head = weight.unflatten(0, (self.heads, -1))
        into = (keys @ per_head).flatten(0, 1)
        shift = None
        if bias is not None:
            shift = (keys @ bias.view(self.heads, -1, 1)).flatten()
        owner: Any = self._of[self.maps.out]
        out = owner.out_proj.weight if packed else weight_of(owner)
        mixed = values @ out.unflatten(1, (self.heads, -1)).permute(1, 2, 0)
        return into, shift, mixed.flatten(0, 1)

    def mask(self, queries: Tensor) -> Tensor | None:
        """What the layer adds to its scores: its causal mask and the one it was given."""
        given = self._mask
        if given is not None and given.dtype == torch.bool:
            given = torch.zeros_like(given, dtype=queries.dtype).masked_fill(~given, -torch.inf)
        if given is not None or not self.maps.causal:
            return given
        n = queries.shape[-2]
        return queries.new_full((n, n), -torch.inf).triu(1)


def propose(model: nn.Module, path: str) -> Maps | None:
    """What the attention module at a path looks like, or None; not proved yet."""
    module = model.get_submodule(path)
    if isinstance(module, nn.MultiheadAttention):
        if module.in_proj_weight is None or not module.batch_first:
            return None
        scale = module.head_dim**-0.5
        return Maps("packed", path, path, path, path, module.num_heads, scale)
    linear = {name: m for name, m in module.named_modules() if is_linear(m)}

    def find(*names: str) -> str | None:
        for name in names:
            for have in linear:
                if have == name or have.endswith(f".{name}"):
                    return f"{path}.{have}"
        return None

    heads = _number(module, "num_heads", "num_attention_heads", "n_heads", "heads")
    out = find(*_OUT)
    if not heads or not out:
        return None
    fused = find(*_FUSED)
    norms = {
        side: next(
            (
                f"{path}.{n}"
                for n, m in module.named_modules()
                if n.split(".")[-1] == side and not isinstance(m, nn.Identity)
            ),
            "",
        )
        for side in ("q_norm", "k_norm")
    }
    if fused:
        width = weight_of(model.get_submodule(fused)).shape[0] // 3
        scale = _number(module, "scale", "scaling") or (int(width) // heads) ** -0.5
        return Maps("fused", fused, fused, fused, out, int(heads), float(scale), "",
                    norms["q_norm"], norms["k_norm"])  # fmt: skip
    for names in _SEPARATE:
        q, k, v = (find(name) for name in names)
        if q and k and v:
            width = weight_of(model.get_submodule(q)).shape[0]
            scale = _number(module, "scale", "scaling") or (int(width) // heads) ** -0.5
            return Maps("separate", q, k, v, out, int(heads), float(scale), "",
                        norms["q_norm"], norms["k_norm"])  # fmt: skip
    return None


def _number(module: nn.Module, *names: str) -> float | None:
    """The first numeric attribute of these names on the module, its children or its config."""
    for each in module.modules():
        for holder in (each, getattr(each, "config", None)):
            for name in names:
                value = getattr(holder, name, None)
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    return value
    return None


def prove(
    model: nn.Module, maps: Maps, seen: Callable[[str], tuple[Tensor, Tensor] | None]
) -> Maps | None:
    """The maps, if they reproduce the layer's attention, tried without and with a causal mask.

    Args:
        model: The backbone.
        maps: A proposal.
        seen: Path of a module to its recorded input and output.
    """
    first, last = seen(maps.q), seen(maps.out)
    if first is None or last is None:
        return None
    x, y = first[0], last[1]
    bias_owner: Any = model.get_submodule(maps.out)
    bias_owner = bias_owner.out_proj if maps.form == "packed" else bias_owner
    target = y if bias_owner.bias is None else y - bias_owner.bias  # type: ignore[operator]
    for causal in (False, True):
        lent = LentMaps(model, replace(maps, causal=causal))
        try:
            q, k, v = lent.q(x), lent.k(x), lent.v(x)
            scores = (q * lent.scale) @ k.transpose(-2, -1)
            mask = lent.mask(q)
            mixed = (scores if mask is None else scores + mask).softmax(-1) @ v
            error = (lent.out(mixed) - target).abs().max()
        except (RuntimeError, AttributeError, TypeError, IndexError):
            return None
        if error <= PROOF_TOLERANCE * target.abs().max():
            return replace(maps, causal=causal)
    return None
