"""What one forward showed: calls of modules, and the sums `next == stream + branch` among them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from restuning.sites.given import Given
from restuning.sites.linear import is_linear, width_in
from restuning.sites.site import Layout, Op

SUM_TOLERANCE = 1e-5
"""Largest error of a sum relative to the branch when it is not bit-equal (fused multiply-adds)."""

ATTENTION = re.compile(r"attn|attention|xca|msa|mixer", re.I)
FFN = re.compile(r"mlp|ffn|feed_?forward|intermediate|glu", re.I)
NORM = re.compile(r"norm", re.I)


@dataclass(eq=False, slots=True)
class Heard:
    """One call of a module: when it ran, what it read and what it returned."""

    path: str
    module: nn.Module
    start: int
    entered: Tensor | None
    cross: bool = False
    given: Given = Given()  # noqa: RUF009
    end: int = -1
    left: Tensor | None = None


def first_tensor(value: Any) -> Tensor | None:
    """The tensor itself, or the first of a tuple, list or model output."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (tuple, list)):
        return next((t for t in value if isinstance(t, Tensor)), None)
    if isinstance(value, dict):
        return next((t for t in value.values() if isinstance(t, Tensor)), None)
    return None


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers in the same memory order."""
    return a.numel() == b.numel() and torch.equal(a.reshape(-1), b.reshape(-1))


def sums(calls: list[Heard], own: Heard) -> list[tuple[int, Heard, Heard]]:
    """All `(time of the stream, who reads it, branch)` with `next == stream + branch output`."""
    streams: list[Heard] = []
    for call in sorted(calls, key=lambda c: c.start):
        if call.entered is not None and not any(
            equal(call.entered, s.entered)  # type: ignore[arg-type]
            for s in streams
        ):
            streams.append(call)
    nexts = [(s.start, s.entered) for s in streams[1:]] + [(own.end, own.left)]
    found: list[tuple[int, Heard, Heard]] = []
    for when, target in nexts:
        matches = [
            (stream.start, stream, branch)
            for stream in streams
            if stream.start < when
            for branch in calls
            if branch is not own
            and branch.left is not None
            and branch.start >= stream.start
            and branch.end <= when
            and _adds(stream.entered, branch.left, target)
        ]
        if matches:
            best = max(matches, key=lambda m: m[2].end)
            if not any(best[2] is known[2] for known in found):
                found.append(best)
    return found


def _adds(stream: Tensor | None, branch: Tensor, target: Tensor | None) -> bool:
    if stream is None or target is None:
        return False
    if not stream.numel() == branch.numel() == target.numel():
        return False
    s, b, t = stream.reshape(-1), branch.reshape(-1), target.reshape(-1)
    few = slice(0, 64)
    if (s[few] + b[few] - t[few]).abs().max() > SUM_TOLERANCE * (1 + t[few].abs().max()):
        return False
    if torch.equal(s, t):
        return False
    total = s + b
    return torch.equal(total, t) or bool((total - t).abs().max() <= SUM_TOLERANCE * b.abs().max())


def kind_of(module: nn.Module) -> str:
    """Name of its class."""
    return type(module).__name__


def outermost(calls: list[Heard], pattern: re.Pattern[str]) -> Heard | None:
    """The first call, not inside another such call, whose class or own name fits."""
    fits = [
        c
        for c in calls
        if (pattern.search(kind_of(c.module)) or pattern.search(c.path.split(".")[-1]))
        and any(is_linear(m) or isinstance(m, nn.MultiheadAttention) for m in c.module.modules())
    ]
    return min(fits, key=lambda c: c.start, default=None)


def operation(inside: list[Heard]) -> tuple[Op | None, Heard | None]:
    """Which operation a branch computes, and the module that computes it."""
    attention = outermost(inside, ATTENTION)
    if attention is not None:
        cross = any(c.cross for c in inside if c.path.startswith(attention.path))
        return ("cross" if cross else "mha"), attention
    ffn = outermost(inside, FFN)
    if ffn is not None:
        return "ffn", ffn
    linear = [c for c in inside if is_linear(c.module)]
    return ("ffn", linear[0]) if len(linear) >= 2 else (None, None)


def layout_of(left: Tensor, module: nn.Module) -> tuple[Layout, int]:
    """Axes and width of a stream, told from the widths that the module maps."""
    if left.dim() != 4:
        return "b n d", left.shape[-1]
    widths = {width_in(m) for m in module.modules() if is_linear(m)}
    if left.shape[-1] in widths:
        return "b h w d", left.shape[-1]
    return "b d h w", left.shape[1]
