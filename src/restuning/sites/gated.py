"""Sums with a gate that is no module, `next == stream + gate * OP(...)`: blocks with adaptive norms.

A gate is one number for every sample and channel, the same for all tokens (adaLN-Zero of DiT, and
of what followed it). So it need not be known: where `next - stream` is the branch times something
that does not depend on the token, a gate is proved. A plain sum is one whose gate is 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from restuning.runtime.precision import HALF_PRECISION
from restuning.sites.sums import SUM_TOLERANCE, ModuleCall, equal, rounding

FEWEST_TOKENS = 3
"""With fewer any difference is some multiple of any branch."""

PROBED = 8
"""Tokens and channels by which branches are told apart before they are compared whole."""


class Step(NamedTuple):
    """One sum of a block: `next = stream + gate * branch`.

    Attributes:
        since: When the stream was first read.
        reader: The first module that read it.
        branch: The call whose output is added.
        plain: Whether the gate is 1.
        via: Outermost modules that read the stream between this sum and the block's end.
    """

    since: int
    reader: ModuleCall
    branch: ModuleCall
    plain: bool
    via: tuple[str, ...]


def find_gated_sums(calls: list[ModuleCall], own: ModuleCall, stream: Tensor) -> list[Step]:
    """The chain of sums from what enters a block to what it returns; empty if none is proved.

    Args:
        calls: Inside the block, without its own.
        own: The block's.
        stream: What entered it.
    """
    if stream.dim() != 3 or stream.shape[1] < FEWEST_TOKENS or own.output is None:
        return []
    streams: list[ModuleCall] = []
    for call in sorted([own, *calls], key=lambda c: c.start):
        x = call.input
        if x is None or x.shape != stream.shape or any(equal(x, s.input) for s in streams):
            continue
        streams.append(call)
    targets = [(s.start, s.input) for s in streams[1:]] + [(own.end, own.output)]
    branches = [
        (c, _take_stream_tokens(c.output, stream))
        for c in calls
        if c.output is not None and _has_stream_tokens(c.output, stream)
    ]
    if not streams or not branches:
        return []
    probes = torch.stack([_probe(values) for _, values in branches])
    chain: list[tuple[ModuleCall, Tensor, ModuleCall, bool]] = []
    reader, value, since = streams[0], stream, streams[0].start
    while not equal(value, own.output):
        following = None
        for when, target in targets:
            if when <= since or target is None or equal(value, target):
                continue
            near = _find_near(_probe(target) - _probe(value), probes, target)
            fits = [
                (branch, plain)
                for branch, values in (branches[i] for i in near)
                if branch.start >= since
                and branch.end <= when
                and (plain := _test_gated_sum(value, values, target)) is not None
            ]
            if fits:
                # The latest: after a LayerScale or norm at the branch's end, if there is one.
                branch, plain = max(fits, key=lambda fit: fit[0].end)
                following = (when, target, branch, plain)
                break
        if following is None:
            return []
        when, target, branch, plain = following
        chain.append((reader, target, branch, plain))
        value, since = target, when
        reader = next((s for s in streams if equal(s.input, target)), own)
    # A tuner's delta must reach all who read the stream from this sum to the block's end.
    between = [target for _, target, _, _ in chain[:-1]]
    return [
        Step(
            reader.start, reader, branch, plain, () if plain else _find_readers(calls, between[k:])
        )
        for k, (reader, _, branch, plain) in enumerate(chain)
    ]


def _has_stream_tokens(branch: Tensor, stream: Tensor) -> bool:
    return (
        branch.dim() == 3
        and branch.shape[0] == stream.shape[0]
        and branch.shape[1] >= stream.shape[1]
        and branch.shape[2] == stream.shape[2]
    )


def _take_stream_tokens(branch: Tensor, stream: Tensor) -> Tensor:
    """The stream's tokens of a branch that holds those of a text before them."""
    return branch[:, branch.shape[1] - stream.shape[1] :]


def _probe(x: Tensor) -> Tensor:
    return x[0, :PROBED, :PROBED].cpu().double()


def _find_near(rest: Tensor, probes: Tensor, target: Tensor) -> list[int]:
    # Least squares over tokens: the gate of each channel, were this the branch.
    gate = (rest * probes).sum(1, keepdim=True) / (probes**2).sum(1, keepdim=True).clamp_min(1e-30)
    error = (rest - gate * probes).abs().amax((1, 2))
    limit = SUM_TOLERANCE * rest.abs().max() + 4 * rounding(target)
    return (error <= limit).nonzero().flatten().tolist()


def _test_gated_sum(stream: Tensor, branch: Tensor, target: Tensor) -> bool | None:
    """Whether `target = stream + gate * branch` with a gate of 1; None if it is no such sum."""
    limit = 4 * rounding(target)
    if target.dtype in HALF_PRECISION:
        # A product and a sum, each rounded once: more would take most branches for rounding.
        limit = 1.5 * torch.finfo(target.dtype).eps * float(target.abs().max())
        stream, branch, target = stream.float(), branch.float(), target.float()
    rest = target - stream
    limit = SUM_TOLERANCE * rest.abs().max() + limit
    # What vanishes in rounding is no branch: anything would fit.
    if rest.abs().max() <= 4 * limit:
        return None
    if (rest - branch).abs().max() <= limit:
        return True
    squares = (branch**2).sum(1, keepdim=True).clamp_min(1e-30)
    gate = (rest * branch).sum(1, keepdim=True) / squares
    # One gate must serve all tokens; this is what tells a branch from any other tensor.
    return False if (rest - gate * branch).abs().max() <= limit else None


def _find_readers(calls: list[ModuleCall], streams: list[Tensor]) -> tuple[str, ...]:
    reads = [c for c in calls if c.input is not None and any(equal(c.input, s) for s in streams)]
    # What is inside another reader is given its input by that one.
    outer = [c for c in reads if not any(o.start < c.start and o.end > c.end for o in reads)]
    return tuple(dict.fromkeys(c.path for c in sorted(outer, key=lambda c: c.start)))
