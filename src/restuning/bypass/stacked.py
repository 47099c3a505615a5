"""Bypasses of adapters of one form as stacked tensors: what a bank answers most tasks with.

Letters in shapes: `L` layers, `k` bypasses, `m` rows (batch times tokens), `r` rank, `d` width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from restuning._errors import TunerShapeError
from restuning.bypass import fused
from restuning.bypass.fused import Adapters, mix_up_weights, run_layers

RANKS = (4, 8, 16, 32, 64, 128, 256)
"""Ranks are padded with zeros to one of these, so that tasks of near ranks share one stack: a zero
column passes gelu, relu and silu as zero and changes nothing."""


class TwoSides(Protocol):
    """A network that can be stacked: it has tuners on both sides of every layer, and a gate."""

    horizontal: nn.ModuleList
    vertical: nn.ModuleList
    gate: nn.Parameter


def pad_rank(rank: int) -> int:
    """The rank that tuners of this rank are padded to in a stack."""
    return next((r for r in RANKS if r >= rank), rank) if rank else 0


class StackedBypass(nn.Module):
    """Bypasses of one form, run together at inference.

    Args:
        bypasses: Trained, of one `stack_key`; they are copied.
    """

    gate: Tensor
    up: Tensor | None

    def __init__(self, bypasses: Sequence[TwoSides]) -> None:
        super().__init__()
        first = fused.fused_signature(bypasses[0].horizontal, bypasses[0].vertical, at_rest=True)
        assert first is not None
        self.activation = first[2]
        across = _stack_side([b.horizontal for b in bypasses])
        below = _stack_side([b.vertical for b in bypasses])
        # `L k`: at inference lambda is a constant, so the sigmoid is taken once.
        gate = torch.stack([b.gate.detach().sigmoid() for b in bypasses], 1)
        self.register_buffer("gate", gate)
        # What does not depend on the input is worked out once.
        self.register_buffer("up", mix_up_weights(across, below, gate))
        self.sides = tuple(n for n, s in (("across", across), ("below", below)) if s is not None)
        for name, side in (("across", across), ("below", below)):
            if side is not None:
                self.register_buffer(f"{name}_down", side.down)
                self.register_buffer(f"{name}_shift", side.shift)

    def forward(self, streams: Sequence[Tensor], pick: Tensor | None = None) -> Tensor:
        """The last states of all, or of those picked by number.

        Shape:
            streams: x_0 ... x_L, `b n d` each. Returns `k b n d`.

        Raises:
            TunerShapeError: The grid of the streams changes on the way.
        """
        shape = streams[-1].shape
        if any(stream.shape != shape for stream in streams):
            raise TunerShapeError(
                "bypasses over streams of different grids do not stack",
                found=" to ".join(str(tuple(s.shape[1:-1])) for s in (streams[0], streams[-1])),
                fix="answer such a task alone: Tuned(host, task)(x)",
            )
        # Stored features may be of half precision.
        flat = [stream.reshape(-1, shape[-1]).to(self.gate.dtype) for stream in streams]
        downs = [
            (self._pick(f"{n}_down", pick), self._pick(f"{n}_shift", pick))
            if n in self.sides
            else None
            for n in ("across", "below")
        ]
        up = None if self.up is None else self._pick("up", pick)
        state = run_layers(flat, self._pick("gate", pick), downs, up, self.activation)
        return state.unflatten(1, shape[:-1])

    def _pick(self, name: str, pick: Tensor | None) -> Tensor:
        whole: Tensor = getattr(self, name)
        # The axes are layers, then bypasses.
        return whole if pick is None else whole[:, pick]


def _stack_side(sides: Sequence[fused.Side]) -> Adapters | None:
    parts = [fused.stack_layers(fused.fold_weights(side, lambda p: p.detach())) for side in sides]
    whole = [p for p in parts if p is not None]
    if not whole:
        return None
    rank = max(pad_rank(p.down.shape[2]) for p in whole)

    def wide(part: Adapters) -> tuple[Tensor, ...]:
        # F.pad counts axes from the last: r is the last of `up` and `shift`, the last but one of
        # `down`.
        more = rank - part.down.shape[2]
        return (
            F.pad(part.down, (0, 0, 0, more)),
            F.pad(part.shift, (0, more)),
            F.pad(part.up, (0, more)),
            part.bias,
        )

    return Adapters(*(torch.cat(each, 1) for each in zip(*map(wide, whole), strict=True)))
