"""Side networks of adapters in few products, with their gradient worked out by hand.

A bypass on class tokens is hundreds of tiny operations, and their bookkeeping costs more than they
do. Here a layer is two products down and one product up, for one bypass or for K of one form at
once; what does not depend on the state is worked out for all layers together; and backward is
written out instead of recorded.

Letters in shapes: `L` layers, `k` bypasses, `m` rows (batch times tokens), `r` rank, `d` width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from restuning.tuners import DropPath, ResAdapter, Scaled, Tuner

_ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}
# aten's own kernels, those that autograd would call: gradients equal the recorded ones.
_DERIVATIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": torch.ops.aten.gelu_backward.default,
    "relu": lambda g, x: g * (x > 0),
    "silu": torch.ops.aten.silu_backward.default,
}


Side = Sequence[nn.Module] | nn.ModuleList


class Adapters(NamedTuple):
    """`x + W_up phi(W_down x)` on one side of every layer, of k bypasses; scales are folded in.

    Attributes:
        down: `L k r d`.
        shift: `L k r`.
        up: `L k d r`.
        bias: `L k d`.
    """

    down: Tensor
    shift: Tensor
    up: Tensor
    bias: Tensor


def split_adapter(
    tuner: nn.Module, *, at_rest: bool = False
) -> tuple[ResAdapter, nn.Parameter | None] | None:
    """The adapter of a tuner and its learned scale; None for what is no plain adapter.

    Args:
        tuner: Any.
        at_rest: As it is at inference: a dropped path is random only while it trains.
    """
    if isinstance(tuner, DropPath):
        random = tuner.training and tuner.p > 0 and not at_rest
        return None if random else split_adapter(tuner.tuner, at_rest=at_rest)
    if isinstance(tuner, Scaled) and tuner.form in ("none", "scalar", "channel"):
        inner = split_adapter(tuner.tuner, at_rest=at_rest)
        # Only one scale can be folded into W_up; two around one adapter run unfused.
        if inner is None or inner[1] is not None:
            return None
        return inner[0], None if tuner.form == "none" else tuner.scale
    # Not isinstance: a subclass may compute something else than the products below.
    return (tuner, None) if type(tuner) is ResAdapter else None


def fused_signature(
    across: Side, below: Side, *, at_rest: bool = False
) -> tuple[int, int, str] | None:
    """Rank of each side (0 for none) and activation, or None for what does not run fused.

    A side has a plain adapter of one rank in every layer or in none, and all one activation.
    """
    ranks, activations = [], set()
    for side in (across, below):
        parts = [split_adapter(t, at_rest=at_rest) for t in side if isinstance(t, Tuner)]
        side_ranks = {None if part is None else part[0].rank for part in parts}
        if None in side_ranks or len(side_ranks) > 1 or len(parts) not in (0, len(side)):
            return None
        activations |= {part[0].activation for part in parts if part is not None}
        ranks.append(next(iter(side_ranks), 0))
    if len(activations) > 1:
        return None
    return ranks[0], ranks[1], next(iter(activations), "gelu")


def fold_weights(side: Side, of: Callable[[nn.Parameter], Tensor]) -> list[Tensor]:
    """W_down, its bias, W_up and its bias of every layer of one side; empty without tuners.

    Args:
        side: Tuners of every layer.
        of: A parameter to what stands for it: itself, or the k stacked ones, `k ...`.
    """
    return [t for tuner in side if isinstance(tuner, Tuner) for t in _fold_scale(tuner, of)]


def stack_layers(side: Sequence[Tensor]) -> Adapters | None:
    """Stack what `fold_weights` lists into one tensor a kind; a bypass alone is k = 1."""
    if not side:
        return None
    # `fold_weights` lists four tensors a layer, so every fourth is of one kind.
    kinds = [torch.stack(list(side[kind::4])) for kind in range(4)]
    # Those of a single bypass have no axis k yet.
    return Adapters(*(kinds if kinds[0].dim() == 4 else (t.unsqueeze(1) for t in kinds)))


def _fold_scale(tuner: nn.Module, of: Callable[[Any], Tensor]) -> tuple[Tensor, ...]:
    parts = split_adapter(tuner, at_rest=True)
    assert parts is not None
    adapter, scale = parts
    up, bias = of(adapter.up.weight), of(adapter.up.bias)
    if scale is not None:
        # One number for all channels, or one each.
        channels = of(scale).reshape(*up.shape[:-2], -1)
        up, bias = up * channels.unsqueeze(-1), bias * channels
    # Folded here, so that the layers below know of no scale and backward of no product with one.
    if adapter.factor != 1.0:
        up, bias = up * adapter.factor, bias * adapter.factor
    return of(adapter.down.weight), of(adapter.down.bias), up, bias


def mix_up_weights(across: Adapters | None, below: Adapters | None, gate: Tensor) -> Tensor | None:
    """`[lambda W_up | (1 - lambda) W_up' | bias]` of every layer, transposed: `L k (2r + 1) d`.

    Args:
        across: Horizontal.
        below: Vertical.
        gate: lambda, `L k`.
    """
    gate = gate[..., None, None]
    shares = [(p, s) for p, s in ((across, gate), (below, 1 - gate)) if p is not None]
    if not shares:
        return None
    # The bias stands as one more row of W_up, against a column of ones: one product for everything.
    first, *more = (p.bias.unsqueeze(2) * share for p, share in shares)
    bias = first + more[0] if more else first
    return torch.cat([*(p.up.mT * share for p, share in shares), bias], 2)


def run_layers(
    streams: Sequence[Tensor],
    gate: Tensor,
    downs: Sequence[tuple[Tensor, Tensor] | None],
    up: Tensor | None,
    activation: str,
    kept: list[Tensor] | None = None,
) -> Tensor:
    """The last state from the taps, `k m d`.

    Args:
        streams: x_0 ... x_L, `m d` each.
        gate: lambda, `L k`.
        downs: W_down and its bias of the horizontal and the vertical side.
        up: What `mix_up_weights` returns.
        activation: phi.
        kept: A list that takes up, for every layer, the state before it and the values before and
            after phi.
    """
    state = streams[0]
    # Cut into layers once, not by an index in every turn of the loop.
    lams = gate[..., None, None].unbind()
    ups = () if up is None else up.unbind()
    sides = [None if side is None else (side[0].unbind(), side[1].unbind()) for side in downs]
    for layer, stream in enumerate(streams[1:]):
        # Both residuals at once: lambda (x_l + ...) + (1 - lambda) (state + ...).
        mixed = torch.lerp(state, stream, lams[layer])
        # The state before the layer, not after it: lambda's gradient and W_down's both need it.
        if kept is not None:
            kept.append(state)
        if ups:
            lowered = [
                _lower(x, side[0][layer], side[1][layer])
                for x, side in zip((stream, state), sides, strict=True)
                if side is not None
            ]
            hidden = torch.cat(lowered, -1)
            ones = mixed.new_ones(()).expand(*mixed.shape[:2], 1)
            columns = torch.cat([_ACTIVATIONS[activation](hidden), ones], -1)
            # In place: the tuners' deltas are never a tensor of their own.
            mixed.baddbmm_(columns, ups[layer])
            if kept is not None:
                kept += [hidden, columns]
        state = mixed
    return state


def run(
    streams: Sequence[Tensor],
    gate: Tensor,
    across: Sequence[Tensor],
    below: Sequence[Tensor],
    activation: str,
) -> Tensor:
    """The last state of k bypasses on shared taps, `k m d`, with its gradient; see `Bypass`.

    Args:
        streams: x_0 ... x_L, `m d` each; no gradient towards them.
        gate: lambda, `k L` (or `L`, of one), after the sigmoid.
        across: `fold_weights` of the horizontal side.
        below: `fold_weights` of the vertical side.
        activation: phi.

    Cost: per layer and bypass `8 m r d` flops forward, `16 m r d` backward; what is kept for
    backward is one state a layer.
    """
    weights = [*across, *below]
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (gate, *weights))
    # Taps go in as a list: autograd looks for gradients among tensors only, and they get none.
    return _Run.apply(list(streams), len(across), activation, keep, gate, *weights)  # type: ignore


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        streams: list[Tensor],
        cut: int,
        activation: str,
        keep: bool,
        gate: Tensor,
        *given: Tensor,
    ) -> Tensor:
        """Run all layers and save what the backward pass needs (see `run`)."""
        # Stacked here and not before: autograd would record one step a weight.
        sides = stack_layers(given[:cut]), stack_layers(given[cut:])
        # A bypass alone hands in its own parameters, which have no axis k; nor may their gradients.
        ctx.alone = gate.dim() == 1
        gate = gate.unsqueeze(1) if ctx.alone else gate.t()
        up = mix_up_weights(*sides, gate)
        downs = [None if side is None else (side.down, side.shift) for side in sides]
        kept: list[Tensor] | None = [] if keep else None
        state = run_layers(streams, gate, downs, up, activation, kept)
        if kept is not None:
            ctx.there, ctx.activation = [side is not None for side in sides], activation
            ctx.layers = len(streams) - 1
            flat = [t for side in sides if side is not None for t in side]
            ctx.save_for_backward(gate, up, *flat, *streams[1:], *kept)
        return state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple:
        """Gradients of the gates and weights, from the last layer to the first."""
        gate, up, *rest = ctx.saved_tensors
        # In the order of `save_for_backward`: four tensors a side, the taps, what each layer kept.
        number, layers = 4 * sum(ctx.there), ctx.layers
        flat = iter(rest[:number])
        across, below = (
            Adapters(*(next(flat) for _ in range(4))) if side else None for side in ctx.there
        )
        streams, kept = rest[number : number + layers], rest[number + layers :]
        per_layer = len(kept) // layers
        others = (1 - gate)[..., None, None].unbind()
        lowest = across.down.shape[2] if across is not None else 0
        of_gate: list[Tensor] = []
        of_up: list[Tensor] = []
        of_before: list[Tensor] = []
        of_down: tuple[list[Tensor], list[Tensor]] = ([], [])
        g = g.contiguous()
        for layer in range(layers - 1, -1, -1):
            state, *inner = kept[layer * per_layer : (layer + 1) * per_layer]
            stream = streams[layer]
            # Of the two residuals; the tuners' share of lambda is added below, from W_up's
            # gradient.
            of_gate.append(
                torch.linalg.vecdot(g.flatten(1), (stream - state).expand_as(g).flatten(1))
            )
            # The first state is a tap, which gets no gradient, so its product is left out.
            further = g * others[layer] if layer else g
            if up is not None:
                before, columns = inner
                of_up.append(columns.mT @ g)
                # The last column is the ones that carry the bias; nothing is behind it.
                of_hidden = (g @ up[layer].mT)[..., :-1].contiguous()
                own = _DERIVATIVES[ctx.activation](of_hidden, before)
                of_before.append(own.sum(1))
                if across is not None:
                    of_down[0].append(_down_gradient(own[..., :lowest], stream))
                if below is not None:
                    of_down[1].append(_down_gradient(own[..., lowest:], state))
                    if layer:
                        # Only the vertical tuner read a state; the horizontal one read a tap.
                        further.baddbmm_(own[..., lowest:], below.down[layer])
            g = further
        to_gate = _stack_first_to_last(of_gate)
        to_weights: list[Tensor] = []
        if up is not None:
            ups, befores, at = _stack_first_to_last(of_up), _stack_first_to_last(of_before), 0
            bias = ups[:, :, -1]
            # d(1 - lambda) = -d lambda: hence the sign of the vertical side.
            for side, share, sign, downs in (
                (across, gate, 1, of_down[0]),
                (below, 1 - gate, -1, of_down[1]),
            ):
                if side is None:
                    continue
                part = slice(at, at + side.down.shape[2])
                at = part.stop
                own = ups[:, :, part]
                # What runs is lambda W_up, so its gradient goes to both: to lambda, and to W_up.
                of_both = (own * side.up.mT).sum((2, 3)) + (bias * side.bias).sum(2)
                to_gate = to_gate + sign * of_both
                kinds = [
                    _stack_first_to_last(downs),
                    befores[:, :, part],
                    (own * share[..., None, None]).mT,
                    bias * share[..., None],
                ]
                if ctx.alone:
                    kinds = [t.squeeze(1) for t in kinds]
                to_weights += [t for layer in zip(*kinds, strict=True) for t in layer]
        to_gate = to_gate.squeeze(1) if ctx.alone else to_gate.t()
        # None for what is no tensor: streams, cut, activation and keep.
        return None, None, None, None, to_gate, *to_weights


def _stack_first_to_last(found: list[Tensor]) -> Tensor:
    """Stack what was computed from the last layer to the first, in the order of the layers."""
    return torch.stack(found[::-1])


def _lower(x: Tensor, down: Tensor, shift: Tensor) -> Tensor:
    """`W_down x + b` as `k m r`, for x shared by all (`m d`, then one product) or `k m d`."""
    k, r, d = down.shape
    # One matrix: a plain product, without the bookkeeping of a batch of one.
    if k == 1:
        return torch.addmm(shift[0], x.reshape(-1, d), down[0].t()).unsqueeze(0)
    if x.dim() == 3:
        return torch.baddbmm(shift.unsqueeze(1), x, down.mT)
    # All k read the same tap: their W_down stand under each other as one matrix.
    flat = torch.addmm(shift.reshape(-1), x, down.reshape(-1, d).t())
    return flat.view(-1, k, r).transpose(0, 1)


def _down_gradient(inner: Tensor, x: Tensor) -> Tensor:
    k, m, r = inner.shape
    if k == 1:
        return (inner[0].t() @ x.reshape(m, -1)).unsqueeze(0)
    if x.dim() == 3:
        return inner.mT @ x
    return (inner.transpose(0, 1).reshape(m, k * r).t() @ x).view(k, r, -1)
