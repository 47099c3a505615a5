"""Frozen modules that are asked outside of their forward: in another precision, and whole where sharded.

What trains beside a backbone in bf16 or fp16 stays in fp32, and what it borrows of the backbone (a norm,
W_q) must be computed in fp32 as well: weights are widened for the moment of one product. The backbone's
own forward is not touched. FSDP2 puts weights together when the module that it was given runs, and a norm
or W_q alone is not that module: what is lent of it is a copy with whole weights, for that moment.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from restuning._torch import copy_bare, is_sharded, read_whole
from restuning.runtime.precision import HALF_PRECISION, is_autocast_to
from restuning.sites.linear import is_plain, read_bias, read_weight


def is_wider(x: Tensor, weight: Tensor | None) -> bool:
    """Whether numbers of another precision meet a weight in half, and autocast does not see to it."""
    return (
        weight is not None
        and weight.dtype in HALF_PRECISION
        and x.dtype != weight.dtype
        and is_plain(weight)
        and not weight.is_meta
        and not is_autocast_to(weight.dtype, x.device)
    )


def run_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """What a frozen norm makes of x, in x's precision."""
    weight = next((p for p in norm.parameters() if p.is_floating_point()), None)
    if not is_wider(x, weight):
        return _gather(norm)(x)
    assert weight is not None
    if torch.compiler.is_compiling():
        # A compiler cannot follow the copy of a module.
        return norm(x.to(weight.dtype)).to(x.dtype)
    return widen(norm, x.dtype)(x)


def run_linear(module: Any, x: Tensor) -> Tensor:
    """What a frozen linear map makes of x, in x's precision."""
    if not (is_wider(x, module.weight) or is_sharded(module.weight)):
        return module(x)
    return run_product(x, read_weight(module), read_bias(module))


def run_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x W^T + b` of frozen weights, in x's precision."""
    if is_wider(x, weight):
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    return F.linear(x, weight, bias)


def widen(module: nn.Module, dtype: torch.dtype) -> Any:
    """A copy of a module without hooks whose numbers have another precision; it itself is not touched."""

    def change(tensor: Tensor) -> Tensor:
        tensor = read_whole(tensor)
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return copy_bare(module, change)


def _gather(module: nn.Module) -> Any:
    """The module itself, or a copy without hooks that has whole weights."""
    if any(map(is_sharded, module.parameters())):
        return copy_bare(module, read_whole)
    return module
