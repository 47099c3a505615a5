"""Bypasses of adapters of one form as stacked tensors: what a bank answers most tasks with.

Letters in shapes: `k` tasks, `m` rows (batch times tokens), `r` rank, `d` width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from restuning import fused
from restuning.bypass import Bypass
from restuning.fused import ACTIVATIONS, Adapters, lower, mixed, step
from restuning.resample import on_grid
from restuning.sites import one_token
from restuning.task import Task
from restuning.tuners import Tuner

RANKS = (4, 8, 16, 32, 64, 128, 256)
"""Ranks are padded with zeros to one of these, so that tasks of near ranks share one stack: a zero
column passes gelu, relu and silu as zero and changes nothing."""


def form(task: Task) -> str | None:
    """Tasks of one form share a stack; None for a task that does not stack."""
    bypass = task.bypass
    if bypass is None or bypass.residual or len(set(bypass.dims)) > 1:
        return None
    if not fused.fits(bypass.tuners, at_rest=True):
        return None
    sides = [[_kind(t) for t in side] for side in (bypass.horizontal, bypass.vertical)]
    return json.dumps([bypass.taps, bypass.dims, *sides, task.pool, task.head is None])


def _kind(tuner: nn.Module) -> Any:
    if not isinstance(tuner, Tuner):
        return None
    parts = fused.taken_apart(tuner, at_rest=True)
    assert parts is not None
    return [_padded(parts[0].rank), parts[0].activation]


def _padded(rank: int) -> int:
    return next((r for r in RANKS if r >= rank), rank)


class Stack(nn.Module):
    """Bypass tasks of one form, answered together.

    Args:
        tasks: By name.

    Attributes:
        names: Of the tasks.
    """

    gate: Tensor
    head: Tensor
    bias: Tensor

    def __init__(self, tasks: Mapping[str, Task]) -> None:
        super().__init__()
        self.names = tuple(tasks)
        members = list(tasks.values())
        bypasses: list[Bypass] = [t.bypass for t in members]  # type: ignore[misc]
        self.taps, self.pool = bypasses[0].taps, members[0].pool
        self.classes = [t.head.out_features if t.head is not None else None for t in members]
        gate = torch.stack([b.gate.detach().sigmoid() for b in bypasses])
        self.register_buffer("gate", gate)
        self.layers = nn.ModuleList(
            _Layer(
                _stacked([b.horizontal[i] for b in bypasses]),
                _stacked([b.vertical[i] for b in bypasses]), gate[:, i],
            )
            for i in range(len(self.taps) - 1)
        )  # fmt: skip
        heads = [t.head for t in members if t.head is not None]
        if heads:
            widest = max(h.out_features for h in heads)
            padded = [_padded_head(h, widest) for h in heads]
            self.register_buffer("head", torch.stack([w for w, _ in padded]))
            self.register_buffer("bias", torch.stack([b for _, b in padded]))

    def forward(
        self, taps: Mapping[str, Tensor], readout: Callable[..., Tensor], names: list[str]
    ) -> dict[str, Tensor]:
        """Logits by name."""
        members = [self.names.index(n) for n in names]
        pick = None if len(members) == len(self.names) else torch.tensor(
            members, device=self.gate.device
        )  # fmt: skip
        streams = [taps[name] for name in self.taps]
        if self.pool in ("cls", "last"):
            mask = getattr(taps, "mask", None)
            streams = [one_token(stream, str(self.pool), mask) for stream in streams]
        shape = streams[-1].shape
        flat = [stream.reshape(-1, shape[-1]).to(self.gate.dtype) for stream in streams]
        gate, state = _of(self.gate, pick), flat[0]
        grids = [stream.shape[1:-1] for stream in streams]
        for number, (layer, stream) in enumerate(zip(self.layers, flat[1:], strict=True)):
            fit = partial(_on_grid, before=grids[number], after=grids[number + 1])
            state = layer(state, stream, gate[:, number], pick, fit)
        feature = readout(state.reshape(-1, *shape[1:]), pool=self.pool)
        feature = feature.unflatten(0, (len(members), -1))
        if self.classes[0] is None:
            return dict(zip(names, feature, strict=True))
        head, bias = _of(self.head, pick), _of(self.bias, pick)
        if feature.dim() > 3:
            bias = bias[:, None]
        logits = torch.einsum("k...d,kcd->k...c", feature.to(head.dtype), head) + bias[:, None]
        return {n: logits[i, ..., : self.classes[m]] for i, (n, m) in
                enumerate(zip(names, members, strict=True))}  # fmt: skip


class _Layer(nn.Module):
    """One layer of k bypasses: what does not depend on the input is worked out once."""

    def __init__(self, across: Adapters | None, below: Adapters | None, gate: Tensor) -> None:
        super().__init__()
        self.kinds = tuple(p and p.activation for p in (across, below))
        for side, part in (("across", across), ("below", below)):
            if part is not None:
                self.register_buffer(f"{side}_down", part.down)
                self.register_buffer(f"{side}_shift", part.shift)
        self.register_buffer("up", mixed(across, below, gate))

    def forward(
        self, state: Tensor, stream: Tensor, gate: Tensor, pick: Tensor | None,
        fit: Callable[[Tensor], Tensor],
    ) -> Tensor:  # fmt: skip
        """`m d` or `k m d`, and `m d`, to `k m d`; `fit` brings rows of the state to the stream's grid."""
        hidden = {
            side: ACTIVATIONS[kind](lower(x, _of(getattr(self, f"{side}_down"), pick),
                                          _of(getattr(self, f"{side}_shift"), pick)))
            for side, x, kind in zip(("across", "below"), (stream, state), self.kinds, strict=True)
            if kind is not None
        }  # fmt: skip
        if "below" in hidden:
            # A mean over the grid and the last product commute.
            hidden["below"] = fit(hidden["below"])
        up = None if self.up is None else _of(self.up, pick)  # type: ignore[arg-type]
        return step(fit(state), stream, list(hidden.values()), up, gate)[0]


def _on_grid(x: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """Average pooling of rows `... (b before) c` to `... (b after) c`."""
    if before == after:
        return x
    states = x.unflatten(-2, (-1, *before)).flatten(0, -len(before) - 2)
    return on_grid(states, after).reshape(*x.shape[:-2], -1, x.shape[-1])


def _of(tensor: Tensor, pick: Tensor | None) -> Tensor:
    return tensor if pick is None else tensor[pick]


def _stacked(tuners: Sequence[nn.Module]) -> Adapters | None:
    parts = [fused.adapters(t, lambda p: p.detach().unsqueeze(0)) for t in tuners]
    whole = [p for p in parts if p is not None]
    if not whole:
        return None
    rank = max(_padded(p.down.shape[1]) for p in whole)

    def wide(part: Adapters) -> tuple[Tensor, ...]:
        more = rank - part.down.shape[1]
        return (F.pad(part.down, (0, 0, 0, more)), F.pad(part.shift, (0, more)),
                F.pad(part.up, (0, more)), part.bias)  # fmt: skip

    stacked = (torch.cat(each) for each in zip(*map(wide, whole), strict=True))
    return Adapters(*stacked, whole[0].activation)


def _padded_head(head: nn.Linear, classes: int) -> tuple[Tensor, Tensor]:
    more = classes - head.out_features
    weight = F.pad(head.weight.detach(), (0, 0, 0, more))
    bias = head.bias.detach() if head.bias is not None else weight.new_zeros(head.out_features)
    return weight, F.pad(bias, (0, more))
