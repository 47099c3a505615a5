"""What one forward showed: calls of modules, and the sums `next == stream + branch` among them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from restuning.sites.attention_inputs import AttentionInputs
from restuning.sites.linear import is_linear, width_in
from restuning.sites.site import Layout, Op

SUM_TOLERANCE = 1e-5
"""Largest error of a sum relative to the branch when it is not bit-equal (fused multiply-adds)."""

PROBES = 64
"""Values by which tensors are told apart before they are compared whole."""

ATTENTION = re.compile(r"attn|attention|xca|msa|mixer", re.I)
FFN = re.compile(
    r"mlp|ffn|feed_?forward|intermediate|glu|moe$|moe_?block|mixture_?of_?experts", re.I
)
NORM = re.compile(r"norm", re.I)


@dataclass(eq=False, slots=True)
class ModuleCall:
    """One call of a module: when it ran, what it read and what it returned."""

    path: str
    module: nn.Module
    start: int
    input: Tensor | None
    cross: bool = False
    attention_inputs: AttentionInputs = AttentionInputs()  # noqa: RUF009
    end: int = -1
    output: Tensor | None = None
    part: int | None = None
    alone: bool = False
    positional: bool = True
    #: Arguments of an attention in half precision, which is run once more for its proof.
    given: tuple[tuple, dict[str, Any]] | None = None


def first_tensor(value: Any) -> Tensor | None:
    """The tensor itself, or the first of a tuple, list or model output."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (tuple, list)):
        return next((t for t in value if isinstance(t, Tensor)), None)
    if isinstance(value, dict):
        return next((t for t in value.values() if isinstance(t, Tensor)), None)
    return None


def take_stream(output: Any, part: int | None = None) -> Tensor | None:
    """The stream among what a module returned: one of its outputs, or the first tensor."""
    return first_tensor(output) if part is None else output[part]


def find_stream_part(output: Any, entered: Tensor | None) -> int | None:
    """Which output of a block goes on with what entered it; None for the first tensor.

    Blocks of text and image return both streams. The image's is told by its shape and, where texts
    are as long, by its likeness: a residual stream resembles what entered.
    """
    if entered is None or not isinstance(output, (tuple, list)):
        return None
    fits = [i for i, t in enumerate(output) if isinstance(t, Tensor) and t.shape == entered.shape]
    if not fits or output[fits[0]] is first_tensor(output) and len(fits) == 1:
        return None
    if len(fits) == 1:
        return fits[0]
    # In double precision: long streams in half precision would overflow.
    flat = entered.detach().flatten().double()

    def likeness(i: int) -> float:
        other = output[i].detach().flatten().double()
        return float(flat @ other / (flat.norm() * other.norm()).clamp_min(1e-30))

    best = max(fits, key=likeness)
    return None if output[best] is first_tensor(output) else best


def equal(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors hold the same numbers in the same memory order."""
    if a is None or b is None:
        return False
    return a.numel() == b.numel() and torch.equal(a.reshape(-1), b.reshape(-1))


def probe(x: Tensor) -> Tensor:
    """A few values spread over a tensor: what differs there need not be compared whole."""
    flat = x.reshape(-1)
    return flat[:: max(1, flat.numel() // PROBES)][:PROBES].cpu().double()


def rounding(x: Tensor) -> float:
    """Largest rounding error of a sum that was written as x."""
    return 2 * torch.finfo(x.dtype).eps * float(x.abs().max())


def find_sums(calls: list[ModuleCall], own: ModuleCall) -> list[tuple[int, ModuleCall, ModuleCall]]:
    """All `(time of the stream, who reads it, branch)` with `next == stream + branch output`."""
    streams: list[ModuleCall] = []
    for call in sorted(calls, key=lambda c: c.start):
        if call.input is not None and not any(equal(call.input, s.input) for s in streams):
            streams.append(call)
    outputs = _Outputs([c for c in calls if c is not own])
    nexts = [(s.start, s.input) for s in streams[1:]] + [(own.end, own.output)]
    chain: list[tuple[int, ModuleCall, ModuleCall]] = []
    for when, target in nexts:
        matches = [
            (stream.start, stream, branch)
            for stream in streams
            if stream.start < when
            for branch in outputs.near(stream.input, target)
            if branch.start >= stream.start
            and branch.end <= when
            and is_sum(stream.input, branch.output, target)
        ]
        if matches:
            # A sum commutes: the stream is what was there first, in the branch's own layout.
            best = max(matches, key=_rank)
            if not any(best[2] is earlier[2] for earlier in chain):
                chain.append(best)
    return chain


def _rank(match: tuple[int, ModuleCall, ModuleCall]) -> tuple[bool, int, int]:
    start, stream, branch = match
    assert stream.input is not None and branch.output is not None
    return stream.input.shape == branch.output.shape, -start, branch.end


class _Outputs:
    """Outputs of calls by size, with a probe of each: a quick search for `target - stream`."""

    def __init__(self, calls: list[ModuleCall]) -> None:
        self.calls: dict[int, list[ModuleCall]] = {}
        probes: dict[int, list[Tensor]] = {}
        for call in calls:
            if call.output is not None:
                self.calls.setdefault(call.output.numel(), []).append(call)
                probes.setdefault(call.output.numel(), []).append(probe(call.output))
        self.rows = {size: torch.stack(same) for size, same in probes.items()}

    def near(self, stream: Tensor | None, target: Tensor | None) -> list[ModuleCall]:
        """The calls whose output may be target - stream."""
        if stream is None or target is None or stream.numel() != target.numel():
            return []
        if target.numel() not in self.rows:
            return []
        t = probe(target)
        error = (self.rows[target.numel()] - (t - probe(stream))).abs().amax(1)
        # Looser than `is_sum`, which decides; this only saves comparing whole tensors.
        fits = error <= SUM_TOLERANCE * (1 + t.abs().max()) + rounding(target)
        return [self.calls[target.numel()][i] for i in fits.nonzero().flatten().tolist()]


def is_sum(stream: Tensor | None, branch: Tensor | None, target: Tensor | None) -> bool:
    """Whether `target == stream + branch`, number by number; a branch of zeros is none."""
    if stream is None or branch is None or target is None:
        return False
    if not stream.numel() == branch.numel() == target.numel():
        return False
    s, b, t = stream.reshape(-1), branch.reshape(-1), target.reshape(-1)
    # Zeros would fit everywhere; fresh LayerScales and zero starts make such branches.
    if torch.equal(s, t):
        return False
    total = s + b
    # Relative to the branch: against a large stream any small branch would pass.
    return torch.equal(total, t) or bool((total - t).abs().max() <= SUM_TOLERANCE * b.abs().max())


CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def holds_experts(module: nn.Module) -> bool:
    """Whether a module keeps the maps of several experts in one weight, `experts out in`."""
    own = module.parameters(recurse=False)
    return any(p.dim() == 3 and min(p.shape[1:]) > 1 for p in own)


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def is_attention(call: ModuleCall) -> bool:
    """Whether a call is of an attention, by the name of its class or its own."""
    names = (type(call.module).__name__, call.path.rpartition(".")[2])
    return any(ATTENTION.search(name) for name in names)


def is_conv(module: nn.Module) -> bool:
    """Whether a module is a convolution."""
    return isinstance(module, CONVOLUTIONS)


def find_outermost(
    calls: list[ModuleCall], pattern: re.Pattern[str], *, conv: bool = False
) -> ModuleCall | None:
    """The first call, not inside another such call, whose class or own name fits.

    Args:
        calls: To choose from.
        pattern: What the name must match.
        conv: Whether a convolution, or weights of several experts, may take the place of a linear map.
    """
    fits = [
        c
        for c in calls
        if (pattern.search(type(c.module).__name__) or pattern.search(c.path.split(".")[-1]))
        and any(
            is_linear(m)
            or isinstance(m, nn.MultiheadAttention)
            or (conv and (is_conv(m) or holds_experts(m)))
            for m in c.module.modules()
        )
    ]
    return min(fits, key=lambda c: c.start, default=None)


def find_operation(inside: list[ModuleCall]) -> tuple[Op | None, ModuleCall | None]:
    """Which operation a branch computes, and the module that computes it."""
    attention = find_outermost(inside, ATTENTION)
    if attention is not None:
        # The keyword may be given to the attention or to a part of it.
        cross = any(c.cross for c in inside if c.path.startswith(attention.path))
        return ("cross" if cross else "mha"), attention
    ffn = find_outermost(inside, FFN, conv=True)
    if ffn is not None:
        return "ffn", ffn
    # A linear map of a pooled vector belongs to a gate over channels (squeeze and excitation).
    linear = [c for c in inside if is_linear(c.module) and _reads_tokens(c)]
    return ("ffn", linear[0]) if len(linear) >= 2 else (None, None)


def _reads_tokens(call: ModuleCall) -> bool:
    return call.input is None or call.input.dim() >= 3


def find_layout(left: Tensor, module: nn.Module, calls: list[ModuleCall]) -> tuple[Layout, int]:
    """Axes and width of a stream.

    Proved by a module that reads or returns a tensor of its shape and whose own axes are known (a
    convolution and a batch norm have channels first, a linear map last); a module that met the
    very stream counts before one that met its shape. Else told from the widths it maps.
    """
    last: Layout = "b n d" if left.dim() != 4 else "b h w d"
    first: Layout = "b d n" if left.dim() != 4 else "b d h w"
    votes: list[Layout] = []
    for call in calls:
        axes = read_axes(call.module, first, last)
        for x in (call.input, call.output):
            if axes is None or x is None or x.shape != left.shape:
                continue
            # The very stream was read or returned: no vote is needed.
            if equal(x, left):
                return axes, left.shape[1 if axes == first else -1]
            votes.append(axes)
    if votes:
        axes = max(votes, key=votes.count)
        return axes, left.shape[1 if axes == first else -1]
    if left.dim() != 4:
        return last, left.shape[-1]
    widths = {width_in(m) for m in module.modules() if is_linear(m)}
    widths |= {m.in_channels for m in module.modules() if isinstance(m, CONVOLUTIONS)}
    if left.shape[1] in widths and left.shape[-1] not in widths:
        return first, left.shape[1]
    return last, left.shape[-1]


def read_axes(module: nn.Module, first: Layout, last: Layout) -> Layout | None:
    """Where a module has its channels, if its kind says so."""
    if isinstance(module, (*CONVOLUTIONS, *BATCH_NORMS, nn.GroupNorm)):
        return first
    # Subclasses of LayerNorm are often made for maps with channels first.
    if is_linear(module) or type(module) is nn.LayerNorm and len(module.normalized_shape) == 1:
        return last
    return None
