"""Side networks of adapters in few products, with their gradient worked out by hand.

A bypass on class tokens is hundreds of tiny operations, and their bookkeeping costs more than they
do. Here a layer is two products down and one product up, for one bypass or for K of one form at
once, and backward is written out instead of recorded.

Letters in shapes: `k` bypasses, `m` rows (batch times tokens), `r` rank, `d` width, `L` layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from restuning.tuners import DropPath, ResAdapter, Scaled, Tuner

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}
_DERIVATIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": torch.ops.aten.gelu_backward.default,
    "relu": lambda g, x: g * (x > 0),
    "silu": torch.ops.aten.silu_backward.default,
}


class Adapters(NamedTuple):
    """`x + W_up phi(W_down x)` of k bypasses at one place; scales are folded in.

    Attributes:
        down: `k r d`.
        shift: `k r`.
        up: `k d r`.
        bias: `k d`.
        activation: phi.
    """

    down: Tensor
    shift: Tensor
    up: Tensor
    bias: Tensor
    activation: str


def taken_apart(
    tuner: nn.Module, *, at_rest: bool = False
) -> tuple[ResAdapter, nn.Parameter | None] | None:
    """The adapter of a tuner and its learned scale; None for what is no plain adapter.

    Args:
        tuner: Any.
        at_rest: As it is at inference: a dropped path is random only while it trains.
    """
    if isinstance(tuner, DropPath):
        random = tuner.training and tuner.p > 0 and not at_rest
        return None if random else taken_apart(tuner.tuner, at_rest=at_rest)
    if isinstance(tuner, Scaled) and tuner.form in ("none", "scalar", "channel"):
        inner = taken_apart(tuner.tuner, at_rest=at_rest)
        if inner is None or inner[1] is not None:
            return None
        return inner[0], None if tuner.form == "none" else tuner.scale
    return (tuner, None) if type(tuner) is ResAdapter else None


def fits(tuners: Sequence[nn.Module], *, at_rest: bool = False) -> bool:
    """Whether these are all plain adapters, or no tuners."""
    return all(
        not isinstance(t, Tuner) or taken_apart(t, at_rest=at_rest) is not None for t in tuners
    )


def adapters(tuner: nn.Module, of: Callable[[nn.Parameter], Tensor]) -> Adapters | None:
    """The stacked weights at one place, or None where there is no tuner.

    Args:
        tuner: One of the k, or of their common form.
        of: A parameter of it to the k stacked ones, `k ...`.
    """
    if not isinstance(tuner, Tuner):
        return None
    parts = taken_apart(tuner, at_rest=True)
    assert parts is not None
    adapter, scale = parts
    up, bias = of(adapter.up.weight), of(adapter.up.bias)  # type: ignore[arg-type]
    if scale is not None:
        # One number for all channels, or one each.
        each = of(scale).reshape(len(up), -1)
        up, bias = up * each.unsqueeze(-1), bias * each
    if adapter.factor != 1.0:
        up, bias = up * adapter.factor, bias * adapter.factor
    down, shift = of(adapter.down.weight), of(adapter.down.bias)  # type: ignore[arg-type]
    return Adapters(down, shift, up, bias, adapter.activation)


def run(
    streams: Sequence[Tensor], gate: Tensor, across: Sequence[Adapters | None],
    below: Sequence[Adapters | None],
) -> Tensor:  # fmt: skip
    """The last state of k bypasses on shared taps, `k m d`; see `Bypass`.

    Args:
        streams: x_0 ... x_L, `m d` each; no gradient towards them.
        gate: lambda, `k L`, after the sigmoid.
        across: Horizontal adapters of each layer.
        below: Vertical adapters of each layer.

    Cost: per layer and bypass `8 m r d` flops forward, `16 m r d` backward; what is kept for
    backward is one state a layer.
    """
    kinds, weights = [], []
    for pair in zip(across, below, strict=True):
        kinds.append(tuple(None if p is None else p.activation for p in pair))
        weights += [t for p in pair if p is not None for t in p[:4]]
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (gate, *weights))
    return _Run.apply(list(streams), kinds, keep, gate, *weights)  # type: ignore[return-value]


def lower(x: Tensor, down: Tensor, shift: Tensor) -> Tensor:
    """`W_down x + b` as `k m r`, for x shared by all (`m d`, then one product) or `k m d`."""
    k, r, d = down.shape
    if x.dim() == 3 and k > 1:
        return torch.baddbmm(shift.unsqueeze(1), x, down.mT)
    x = x.reshape(-1, d)
    return torch.addmm(shift.reshape(-1), x, down.reshape(-1, d).t()).view(-1, k, r).transpose(0, 1)


def mixed(across: Adapters | None, below: Adapters | None, gate: Tensor) -> Tensor | None:
    """`[lambda W_up | (1 - lambda) W_up' | bias]` of one layer, transposed: `k (2r + 1) d`.

    Args:
        across: Horizontal.
        below: Vertical.
        gate: lambda of the layer, `k`.
    """
    gates = [(p, g.view(-1, 1, 1)) for p, g in ((across, gate), (below, 1 - gate)) if p is not None]
    if not gates:
        return None
    bias = sum(p.bias.unsqueeze(1) * g for p, g in gates)
    return torch.cat([*(p.up.mT * g for p, g in gates), bias], 1)  # type: ignore[list-item]


def step(
    state: Tensor, stream: Tensor, hidden: Sequence[Tensor], up: Tensor | None, gate: Tensor
) -> tuple[Tensor, Tensor | None]:
    """`x_l'` from `x_{l-1}'`, and the hidden values it was made of, `k m (2r + 1)`.

    Args:
        state: `k m d`, or `m d` for all.
        stream: `m d`.
        hidden: After the activation, `k m r` each, in the order of `mixed`.
        up: What `mixed` gives.
        gate: lambda of the layer, `k`.
    """
    after = torch.lerp(state, stream, gate.view(-1, 1, 1))
    if up is None:
        return after, None
    ones = after.new_ones(()).expand(*after.shape[:2], 1)
    columns = torch.cat([*hidden, ones], -1)
    return after.baddbmm_(columns, up), columns


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, streams: list[Tensor], kinds: list, keep: bool, gate: Tensor, *weights: Tensor
    ) -> Tensor:  # fmt: skip
        """See `run`."""
        state, kept, layers = streams[0], [], _layers(kinds, weights)
        for layer, (stream, pair) in enumerate(zip(streams[1:], layers, strict=True)):
            there = [(p, x) for p, x in zip(pair, (stream, state), strict=True) if p is not None]
            before = [lower(x, p.down, p.shift) for p, x in there]
            hidden = [ACTIVATIONS[p.activation](b) for (p, _), b in zip(there, before, strict=True)]
            up = mixed(*pair, gate[:, layer])
            after, columns = step(state, stream, hidden, up, gate[:, layer])
            if keep:
                kept += [state, stream, columns, up, *before]
            state = after
        if keep:
            ctx.kinds, ctx.given = kinds, len(weights)
            ctx.save_for_backward(gate, *weights, *kept)
        return state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple:
        """Gradients of the gates and weights, from the last layer to the first."""
        gate, *rest = ctx.saved_tensors
        layers, kept = _layers(ctx.kinds, rest[: ctx.given]), rest[ctx.given :]
        of_gate = torch.empty_like(gate)
        found: list[list[Tensor]] = []
        g = g.contiguous()
        for layer in range(len(layers) - 1, -1, -1):
            pair, lam = layers[layer], gate[:, layer].view(-1, 1, 1)
            number = 4 + sum(p is not None for p in pair)
            state, stream, columns, up, *before = kept[-number:]
            kept = kept[:-number]
            of_gate[:, layer] = _inner(g, stream) - _inner(g, state)
            further = g * (1 - lam) if layer else None
            here: list[Tensor] = []
            if up is not None:
                of_columns, of_up = g @ up.mT, columns.mT @ g
                of_bias, at = of_up[:, -1], 0
                for p, x, share, sign in (
                    (pair[0], stream, lam, 1), (pair[1], state, 1 - lam, -1),
                ):  # fmt: skip
                    if p is None:
                        continue
                    part = slice(at, at + p.down.shape[1])
                    at = part.stop
                    own = of_up[:, part]
                    # Of lambda W_up: to lambda and to W_up.
                    of_gate[:, layer] += sign * (
                        (own * p.up.mT).sum((1, 2)) + (of_bias * p.bias).sum(1)
                    )
                    inner = _DERIVATIVES[p.activation](
                        of_columns[..., part].contiguous(), before.pop(0).contiguous()
                    )
                    here += [_of_down(inner, x), inner.sum(1), (own * share).mT,
                             of_bias * share[..., 0]]  # fmt: skip
                    if sign < 0 and further is not None:
                        further = further.baddbmm_(inner, p.down)
            found.append(here)
            g = further  # type: ignore[assignment]
        return None, None, None, of_gate, *(t for here in reversed(found) for t in here)


def _layers(kinds: Sequence, weights: Sequence[Tensor]) -> list[tuple]:
    rest = iter(weights)
    return [
        tuple(None if kind is None else Adapters(*(next(rest) for _ in range(4)), kind)
              for kind in pair)
        for pair in kinds
    ]  # fmt: skip


def _inner(g: Tensor, x: Tensor) -> Tensor:
    """Inner products over rows and channels, `k`."""
    flat = g.flatten(1)
    if x.dim() == 2:
        return flat @ x.reshape(-1)
    return torch.linalg.vecdot(flat, x.flatten(1))


def _of_down(inner: Tensor, x: Tensor) -> Tensor:
    k, m, r = inner.shape
    if x.dim() == 3 and k > 1:
        return inner.mT @ x
    return (inner.transpose(0, 1).reshape(m, k * r).t() @ x.reshape(m, -1)).view(k, r, -1)
