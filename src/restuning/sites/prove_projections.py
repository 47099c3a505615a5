"""The projections of a layer's attention: found by structure, proved by one forward.

A proof recomputes the layer's attention from them and compares it with what the layer
returned. What cannot be proved is not lent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from restuning._errors import ProjectionsError
from restuning.sites.hear_again import Recorded, hear_again
from restuning.sites.linear import is_linear, read_bias, width_out
from restuning.sites.projections import LentProjections, Projections
from restuning.sites.sums import ModuleCall, equal

PROOF_TOLERANCE = 1e-4
"""Largest error of the recomputed attention, relative to its maximum: fp32 fused kernels differ
from plain softmax by about 1e-6."""

_FUSED = ("qkv", "in_proj", "query_key_value", "Wqkv", "c_attn", "qkv_proj")
_SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("to_q", "to_k", "to_v"),
    ("q_lin", "k_lin", "v_lin"),
)
# The more special first: BERT's `output.dense` also ends in `dense`.
_OUT = ("out_proj", "o_proj", "proj", "output.dense", "to_out.0", "dense", "c_proj", "out_lin", "o")
_CAPS = ("attn_logit_softcapping", "attn_logit_softcap")
"""A cap on the scores is close to no change at small scores, so that a proof could pass by chance."""


def propose(model: nn.Module, path: str) -> Projections | None:
    """Guess the projections of the attention at a path, by names and widths; None without any."""
    module = model.get_submodule(path)
    if isinstance(module, nn.MultiheadAttention):
        # Keys of another width have three weights; tokens before the batch are no stream `b n d`.
        if module.in_proj_weight is None or not module.batch_first:
            return None
        size = module.head_dim
        return Projections(
            "packed",
            path,
            path,
            path,
            path,
            module.num_heads,
            size**-0.5,
            module=path,
            kv_heads=module.num_heads,
            head_dim=size,
        )
    linear = {name: m for name, m in module.named_modules() if is_linear(m)}

    def find(*names: str) -> str | None:
        for name in names:
            for have in linear:
                if have == name or have.endswith(f".{name}"):
                    return f"{path}.{have}"
        return None

    heads = int(_find_number(module, "num_heads", "num_attention_heads", "n_heads", "heads") or 0)
    out = find(*_OUT)
    if not heads or not out or _find_number(module, *_CAPS):
        return None
    fused = find(*_FUSED)
    separate = next((paths for names in _SEPARATE if all(paths := [find(n) for n in names])), None)
    if not fused and separate is None:
        return None
    q, k, v = (fused, fused, fused) if fused else (str(p) for p in separate or ())
    proposal = Projections(
        "fused" if fused else "separate",
        str(q),
        str(k),
        str(v),
        out,
        heads,
        float(_find_number(module, "scale", "scaling") or 0.0),
        q_norm=_find_norm(module, path, "q_norm"),
        k_norm=_find_norm(module, path, "k_norm"),
        module=path,
        kv_heads=int(_find_number(module, "num_key_value_heads", "num_kv_heads") or 0),
    )
    return measure_heads(model, proposal)


def measure_heads(model: nn.Module, projections: Projections) -> Projections | None:
    """Projections with the width of a head, the key heads and the scale; None if widths do not fit."""
    rows = width_out(model.get_submodule(projections.q))
    if projections.form == "fused":
        # One weight gives all query heads, then the key heads, then as many value heads.
        groups = projections.kv_heads or projections.heads
        size = rows // (projections.heads + 2 * groups)
    else:
        size = rows // projections.heads
        groups = width_out(model.get_submodule(projections.k)) // max(size, 1)
    if not size or not groups or projections.heads % groups:
        return None
    return replace(
        projections, kv_heads=groups, head_dim=size, scale=projections.scale or size**-0.5
    )


def _find_norm(module: nn.Module, path: str, side: str) -> str:
    for name, each in module.named_modules():
        if name.split(".")[-1] == side and not isinstance(each, nn.Identity):
            return f"{path}.{name}"
    return ""


def _find_number(module: nn.Module, *names: str) -> float | None:
    """The first numeric attribute of these names on the module, its children or its config."""
    for each in module.modules():
        for holder in (each, getattr(each, "config", None)):
            for name in names:
                value = getattr(holder, name, None)
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    return value
    return None


def prove(
    model: nn.Module,
    projections: Projections,
    find_call: Callable[[str], ModuleCall | None],
    leave: Recorded,
) -> Projections | None:
    """The projections, if they reproduce the layer's attention.

    Rotary positions and a causal mask are tried where the arguments leave them open.

    Args:
        model: The backbone.
        projections: A proposal.
        find_call: Path of a module to its recorded call.
        leave: The call whose output is added to the stream.
    """
    attempts = _try_readings(model, projections, find_call, leave)
    return next((tried for tried, error in attempts if error <= PROOF_TOLERANCE), None)


def prove_declared(
    model: nn.Module,
    projections: Projections,
    find_call: Callable[[str], ModuleCall | None],
    leave: Recorded,
) -> Projections:
    """The projections that a user declared, or an error that says what does not hold.

    Args:
        model: The backbone.
        projections: The declared ones, with whole paths.
        find_call: Path of a module to its recorded call.
        leave: The call whose output is added to the stream.

    Raises:
        ProjectionsError: They are no linear maps, do not fit the number of heads, did not run, or
            do not give what the layer returned.
    """
    four = {"q": projections.q, "k": projections.k, "v": projections.v, "out": projections.out}
    curved = [f"{n} ({p})" for n, p in four.items() if not is_linear(model.get_submodule(p))]
    if curved:
        raise _refusal(projections, f"no linear map: {', '.join(curved)}")
    measured = measure_heads(model, projections)
    if measured is None:
        rows = width_out(model.get_submodule(projections.q))
        raise _refusal(
            projections, f"W_q gives {rows} channels, which do not make {projections.heads} heads"
        )
    silent = [f"{n} ({p})" for n, p in four.items() if find_call(p) is None]
    if silent:
        raise _refusal(projections, f"did not run in the block's forward: {', '.join(silent)}")
    attempts = list(_try_readings(model, measured, find_call, leave))
    proved = next((tried for tried, error in attempts if error <= PROOF_TOLERANCE), None)
    if proved is None:
        least = min((error for _, error in attempts), default=float("inf"))
        off = f"by {least:.1%} of the largest value" if least < float("inf") else "in shape"
        raise _refusal(projections, f"attention computed from them differs from the layer's {off}")
    return proved


def _refusal(projections: Projections, found: str) -> ProjectionsError:
    return ProjectionsError(
        "the declared projections are not those of the layer",
        where=projections.module,
        found=found,
        fix="correct q, k, v, out, heads or scale of Projections.declare(...); or leave projections "
        'out and use tuners with query="stream"',
    )


def _try_readings(
    model: nn.Module,
    projections: Projections,
    find_call: Callable[[str], ModuleCall | None],
    leave: Recorded,
) -> Iterator[tuple[Projections, float]]:
    """Every reading of a layer's arguments, and its error relative to the largest value."""
    said = find_call(projections.out)
    direct = said is not None and equal(leave.output, said.output)
    heard = hear_again(model, projections, find_call)
    first, last, own = (
        heard(projections.q),
        heard(projections.out),
        heard(projections.module),
    )
    if first is None or last is None or own is None or first.input is None or last.output is None:
        return
    # Keys that a cache would hand back prove nothing.
    beside = own.attention_inputs._replace(past=None, whole=False)
    x, y = first.input, last.output
    bias_owner: Any = model.get_submodule(projections.out)
    bias = read_bias(bias_owner.out_proj if projections.form == "packed" else bias_owner)
    # Tuners use W_o without its bias, so the proof does.
    target = y if bias is None else y - bias
    causal = getattr(model.get_submodule(projections.module), "is_causal", False) is True
    # A mask that was given shows whether it hides the future; else the likelier comes first.
    masks = (_hides_future(beside.mask),) if beside.mask is not None else (causal, not causal)
    if beside.context is not None:
        masks = (False,)
    largest = float(target.abs().max())
    for rope in ("", "half", "interleaved") if beside.rope is not None else ("",):
        for masked in masks:
            tried = replace(projections, rope=rope, causal=masked)
            error = _measure_error(LentProjections(model, tried, beside), x, target)
            context = 0 if beside.context is None else beside.context.shape[-1]
            proved = replace(tried, direct=direct, context=context)
            # An attention of zeros is reproduced by zeros.
            yield proved, error / largest if largest else error


def _measure_error(projections: LentProjections, x: Tensor, target: Tensor) -> float:
    try:
        q = projections.q(x)
        k, v = projections.keys_values(x)
        scores, mask = (q * projections.scale) @ k.transpose(-2, -1), projections.mask(q, k)
        mixed = (scores if mask is None else scores + mask).softmax(-1) @ v
        return float((projections.out(mixed) - target).abs().max())
    # Shapes of a wrong reading do not fit: that is an answer, not an error.
    except (RuntimeError, AttributeError, TypeError, IndexError, ValueError):
        return float("inf")


def _hides_future(mask: Tensor) -> bool:
    """Whether the second token sees the first, and the first not the second."""
    if mask.shape[-2] < 2:
        return False
    later, earlier = mask[0, 0, 0, 1], mask[0, 0, 1, 0]
    if mask.dtype == torch.bool:
        return bool(earlier) and not bool(later)
    return bool(earlier > later)
