"""Whether a block of any kind returns a sum of two streams: how blocks of CNNs are known."""

from __future__ import annotations

import torch
from torch import Tensor

from restuning.sites.sums import SUM_TOLERANCE, ModuleCall, equal, probe, rounding

TAIL = 4
"""Modules after a block's sum that are looked through: an activation, dropout, an empty gate."""


def is_residual(calls: list[ModuleCall], own: ModuleCall) -> bool:
    """Whether a block returns `f(a + c b)` of two streams, f being modules at its end or nothing.

    a and b are what modules inside read or returned: the block's input or a shortcut's output, and
    a branch. c is any one number (NFNets scale their branches). Parallel branches count as well:
    the sum of all that the modules which read the block's input return (RepVGG).
    """
    if own.output is None:
        return False
    targets, heads = [own.output], [own.output]
    for _ in range(TAIL):
        heads = [
            c.input
            for c in calls
            if c.output is not None
            and c.input is not None
            and any(equal(c.output, h) for h in heads)
            # Identities (dropout in eval mode) would only repeat a target.
            and not equal(c.output, c.input)
        ]
        targets += heads
    if own.output.dim() == 4:
        # A block may compute with channels last and turn what it returns (MaxViT).
        targets.append(own.output.movedim(1, -1))
    seen = [x for c in [own, *calls] for x in (c.input, c.output if c is not own else None)]
    for target in targets:
        terms = [x for x in seen if x is not None and x.numel() == target.numel()]
        if not terms:
            continue
        rows, t = torch.stack([probe(x) for x in terms]), probe(target)
        shortcuts = _find_readers(calls, own, target)
        if (
            _is_sum_of_two(terms, rows, target, t)
            or _is_parallel_sum(shortcuts, target)
            or _is_shortcut_alone(calls, own, shortcuts, target)
        ):
            return True
    return False


def _is_sum_of_two(terms: list[Tensor], rows: Tensor, target: Tensor, t: Tensor) -> bool:
    # A multiple of the sum itself, or two multiples of one tensor, would fit by themselves.
    alike = _find_proportional(torch.cat([rows, t[None]]))
    apart = (~alike[-1, :-1]).nonzero().flatten().tolist()
    for i in apart:
        rest = t - rows[i]
        others = [j for j in apart if not alike[i, j]]
        if not others:
            continue
        b = rows[others]
        factor = (b @ rest) / (b * b).sum(1).clamp_min(1e-30)
        error = (rest - factor[:, None] * b).abs().amax(1)
        limit = SUM_TOLERANCE * rest.abs().max() + rounding(target)
        # What vanishes in rounding is no branch: anything would fit.
        if rest.abs().max() < 4 * limit:
            continue
        for place in (error <= limit).nonzero().flatten().tolist():
            whole = target.float() - terms[i].reshape(target.shape)
            branch = terms[others[place]].reshape(target.shape) * float(factor[place])
            # The factor was measured on a few values, and is less exact for the whole tensor.
            if (whole - branch).abs().max() <= 10 * limit:
                return True
    return False


def _find_proportional(rows: Tensor) -> Tensor:
    """Which rows are multiples of which: copies, constant scales, or nothing at all."""
    products = rows @ rows.T
    sizes = products.diagonal()
    # Cauchy and Schwarz: equal only for multiples of one another.
    return products**2 >= (1 - 1e-9) * sizes[:, None] * sizes


def _find_readers(calls: list[ModuleCall], own: ModuleCall, target: Tensor) -> list[ModuleCall]:
    """The outermost modules that read the block's input and return a tensor of the target's size."""
    reads = [
        c
        for c in calls
        if c.input is not None
        and c.output is not None
        and own.input is not None
        and c.output.numel() == target.numel()
        and equal(c.input, own.input)
    ]
    return [c for c in reads if not any(o.start < c.start and o.end > c.end for o in reads)]


def _is_shortcut_alone(
    calls: list[ModuleCall], own: ModuleCall, outer: list[ModuleCall], target: Tensor
) -> bool:
    """Whether a shortcut alone is left: fresh ResNets start with branches of zeros."""
    nothing = any(
        c.output is not None and c.output.numel() == target.numel() and not c.output.any()
        for c in calls
    )
    shortcuts = [own.input, *[c.output for c in outer]]
    return (
        nothing
        and bool(target.any())
        and any(s is not None and equal(s, target) for s in shortcuts)
    )


def _is_parallel_sum(outer: list[ModuleCall], target: Tensor) -> bool:
    outputs = [c.output.reshape(-1) for c in outer if c.output is not None]
    # A single reader is the block's whole computation and no sum.
    if len(outputs) < 2:
        return False
    total = torch.stack(outputs).sum(0)
    error = (total - target.reshape(-1)).abs().max()
    return bool(error <= SUM_TOLERANCE * target.abs().max() + 2 * rounding(target))
