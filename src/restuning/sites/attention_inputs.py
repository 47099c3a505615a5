"""What an attention is given beside the stream in one forward: mask, positions, past, context."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

CONTEXT = ("encoder_hidden_states", "key_value_states", "context")
"""Keywords under which cross-attention is given the other sequence."""

_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache", "cache_params")
"""Keywords under which modules are given the keys of earlier tokens."""


class AttentionInputs(NamedTuple):
    """One forward's conditions of one attention.

    Attributes:
        mask: `b|1 1 n m`: booleans (True is seen) or numbers added to the scores.
        bias: `1 h n m`, a relative-position bias, added as well.
        rope: Cosines and sines of rotary positions, `b|1 n e` each.
        past: Keys and values of earlier tokens, `b h n e` each.
        whole: `past` is a buffer of fixed size into which this forward's own keys are written.
        context: The other sequence of a cross-attention, `b m d`.
    """

    mask: Tensor | None = None
    bias: Tensor | None = None
    rope: tuple[Tensor, Tensor] | None = None
    past: tuple[Tensor, Tensor] | None = None
    whole: bool = False
    context: Tensor | None = None


def read_attention_inputs(
    module: nn.Module, args: tuple, kwargs: Mapping[str, Any]
) -> AttentionInputs:
    """Read mask, positions, cache and context off an attention's arguments."""
    context = next((kwargs[n] for n in CONTEXT if isinstance(kwargs.get(n), Tensor)), None)
    mask, rope, past, whole = None, None, None, False
    for name, value in [*(("", v) for v in args), *kwargs.items()]:
        if isinstance(value, Tensor):
            # A bias of positions has an axis of heads, but for a model with one head.
            if value.dim() == 4 and value.shape[1] == 1 and name != "position_bias":
                mask = value
        elif isinstance(value, tuple) and len(value) == 2:
            # A pair with four axes would be keys and values.
            if all(isinstance(v, Tensor) and v.dim() in (2, 3) for v in value):
                rope = value
        # Under cross-attention it holds the other sequence, which `context` gives already.
        elif context is None and _is_cache(value):
            past, whole = _past(value, module)
    return AttentionInputs(mask, None, rope, past, whole, context)


def returns_bias(module: nn.Module) -> bool:
    """Whether it is an attention such as T5's, which returns its relative-position bias."""
    return "position_bias" in inspect.signature(type(module).forward).parameters


def read_position_bias(output: Any) -> Tensor | None:
    """The bias among what such an attention returned."""
    bias = output[1] if isinstance(output, tuple) and len(output) > 1 else None
    return bias if isinstance(bias, Tensor) and bias.dim() == 4 else None


def has_past(cache: Any) -> bool:
    """Whether a value is a cache that holds earlier tokens."""
    return _is_cache(cache) and bool(cache.get_seq_length() > 0)


def _is_cache(value: Any) -> bool:
    # Of transformers, known by its method: this room imports no model library.
    return hasattr(value, "get_seq_length")


def leave_out_caches(args: tuple, kwargs: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Arguments without the caches of earlier tokens, to which another run would add its own."""
    return (
        tuple(None if _is_cache(value) else value for value in args),
        {k: None if k in _CACHES or _is_cache(value) else value for k, value in kwargs.items()},
    )


def _past(cache: Any, module: nn.Module) -> tuple[tuple[Tensor, Tensor] | None, bool]:
    # An encoder-decoder keeps two caches in one.
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", ())
    index = next(
        (i for m in module.modules() if (i := getattr(m, "layer_idx", None)) is not None), None
    )
    if index is None or index >= len(layers) or not has_past(cache):
        return None, False
    keys, values = getattr(layers[index], "keys", None), getattr(layers[index], "values", None)
    # Layers of a cache are made empty and filled by their first forward.
    if not isinstance(keys, Tensor) or not isinstance(values, Tensor) or not keys.numel():
        return None, False
    # transformers compiles only over buffers of fixed size, so this tells them apart.
    return (keys, values), bool(getattr(layers[index], "is_compileable", False))


def rotate(x: Tensor, rope: tuple[Tensor, Tensor], style: str) -> Tensor:
    """`x cos + turn(x) sin` on the leading channels of every head, `... h n e -> ... h n e`.

    Args:
        x: Queries or keys.
        rope: Cosines and sines; channels beyond their width are left as they are.
        style: "half" (channel i turns with i + e/2, Llama) or "interleaved" (with i + 1, GPT-J).
    """
    cos, sin = (t.unsqueeze(-3).to(x.dtype) for t in rope)
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    if style == "half":
        first, second = turned.chunk(2, -1)
        other = torch.cat([-second, first], -1)
    else:
        other = torch.stack([-turned[..., 1::2], turned[..., ::2]], -1).flatten(-2)
    return torch.cat([turned * cos + other * sin, rest], -1)
