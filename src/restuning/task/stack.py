"""Bypasses of adapters of one form as stacked tensors: what a bank answers most tasks with.

Letters in shapes: `k` tasks, `m` rows (batch times tokens), `r` rank, `d` width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from restuning._errors import TunerShapeError
from restuning.bypass import Bypass, fused
from restuning.bypass.fused import Adapters, mix_up_weights, run_layers
from restuning.sites import one_token, tokens_of
from restuning.task.task import Task

RANKS = (4, 8, 16, 32, 64, 128, 256)
"""Ranks are padded with zeros to one of these, so that tasks of near ranks share one stack: a zero
column passes gelu, relu and silu as zero and changes nothing."""


def form(task: Task) -> str | None:
    """Tasks of one form share a stack; None for a task that does not stack."""
    bypass = task.side
    if not isinstance(bypass, Bypass) or bypass.residual or len(set(bypass.dims)) > 1:
        return None
    found = fused.fused_signature(bypass.horizontal, bypass.vertical, at_rest=True)
    if found is None:
        return None
    ranks = [_padded(rank) for rank in found[:2]]
    return json.dumps([bypass.taps, bypass.dims, *ranks, found[2], task.pool, task.head is None])


def _padded(rank: int) -> int:
    return next((r for r in RANKS if r >= rank), rank) if rank else 0


class Stack(nn.Module):
    """Bypass tasks of one form, answered together.

    Args:
        tasks: By name.

    Attributes:
        names: Of the tasks.
    """

    gate: Tensor
    up: Tensor | None
    head: Tensor
    bias: Tensor

    def __init__(self, tasks: Mapping[str, Task]) -> None:
        super().__init__()
        self.names = tuple(tasks)
        members = list(tasks.values())
        bypasses: list[Bypass] = [t.side for t in members]  # type: ignore[misc]
        self.taps, self.pool = bypasses[0].taps, members[0].pool
        self.classes = [t.head.out_features if t.head is not None else None for t in members]
        found = fused.fused_signature(bypasses[0].horizontal, bypasses[0].vertical, at_rest=True)
        assert found is not None
        self.activation = found[2]
        across = _stacked([b.horizontal for b in bypasses])
        below = _stacked([b.vertical for b in bypasses])
        gate = torch.stack([b.gate.detach().sigmoid() for b in bypasses], 1)
        self.register_buffer("gate", gate)
        # What does not depend on the input is worked out once.
        self.register_buffer("up", mix_up_weights(across, below, gate))
        self.sides = tuple(n for n, s in (("across", across), ("below", below)) if s is not None)
        for name, side in (("across", across), ("below", below)):
            if side is not None:
                self.register_buffer(f"{name}_down", side.down)
                self.register_buffer(f"{name}_shift", side.shift)
        heads = [t.head for t in members if t.head is not None]
        if heads:
            widest = max(h.out_features for h in heads)
            padded = [_padded_head(h, widest) for h in heads]
            self.register_buffer("head", torch.stack([w for w, _ in padded]))
            self.register_buffer("bias", torch.stack([b for _, b in padded]))

    def forward(
        self, taps: Mapping[str, Tensor], readout: Callable[..., Tensor], names: list[str]
    ) -> dict[str, Tensor]:
        """Logits by name.

        Raises:
            TunerShapeError: The grid of the streams changes on the way.
        """
        members = [self.names.index(n) for n in names]
        pick = (
            None
            if len(members) == len(self.names)
            else torch.tensor(members, device=self.gate.device)
        )
        streams = [taps[name] for name in self.taps]
        if tokens_of(self.pool) in ("cls", "last"):
            mask = getattr(taps, "mask", None)
            streams = [one_token(stream, str(self.pool), mask) for stream in streams]
        shape = streams[-1].shape
        if any(stream.shape != shape for stream in streams):
            raise TunerShapeError(
                "bypasses over streams of different grids do not stack",
                where=", ".join(names[:4]),
                found=" to ".join(str(tuple(s.shape[1:-1])) for s in (streams[0], streams[-1])),
                fix="answer such a task alone: Tuned(host, task)(x)",
            )
        flat = [stream.reshape(-1, shape[-1]).to(self.gate.dtype) for stream in streams]
        downs = [
            (self._of(f"{n}_down", pick), self._of(f"{n}_shift", pick)) if n in self.sides else None
            for n in ("across", "below")
        ]
        up = None if self.up is None else self._of("up", pick)
        state = run_layers(flat, self._of("gate", pick), downs, up, self.activation)  # type: ignore[arg-type]
        feature = readout(state.reshape(-1, *shape[1:]), pool=self.pool)
        feature = feature.unflatten(0, (len(members), -1))
        if self.classes[0] is None:
            return dict(zip(names, feature, strict=True))
        head, bias = self.head, self.bias
        if pick is not None:
            head, bias = head[pick], bias[pick]
        if feature.dim() > 3:
            bias = bias[:, None]
        logits = torch.einsum("k...d,kcd->k...c", feature.to(head.dtype), head) + bias[:, None]
        return {
            n: logits[i, ..., : self.classes[m]]
            for i, (n, m) in enumerate(zip(names, members, strict=True))
        }

    def _of(self, name: str, pick: Tensor | None) -> Tensor:
        whole = getattr(self, name)
        return whole if pick is None else whole[:, pick]


def _stacked(sides: Sequence[fused.Side]) -> Adapters | None:
    parts = [fused.stacked(fused.weights(side, lambda p: p.detach())) for side in sides]
    whole = [p for p in parts if p is not None]
    if not whole:
        return None
    rank = max(_padded(p.down.shape[2]) for p in whole)

    def wide(part: Adapters) -> tuple[Tensor, ...]:
        more = rank - part.down.shape[2]
        return (
            F.pad(part.down, (0, 0, 0, more)),
            F.pad(part.shift, (0, more)),
            F.pad(part.up, (0, more)),
            part.bias,
        )

    return Adapters(*(torch.cat(each, 1) for each in zip(*map(wide, whole), strict=True)))


def _padded_head(head: nn.Linear, classes: int) -> tuple[Tensor, Tensor]:
    more = classes - head.out_features
    weight = F.pad(head.weight.detach(), (0, 0, 0, more))
    bias = head.bias.detach() if head.bias is not None else weight.new_zeros(head.out_features)
    return weight, F.pad(bias, (0, more))
