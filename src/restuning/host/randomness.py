"""A backbone that answers the same input differently each time is noticed by asking it twice."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from restuning._errors import BackboneError
from restuning._torch import tree_leaves
from restuning.runtime.precision import HALF_PRECISION

LEAST_RANDOM = 1e-3
"""Smallest difference of two answers, relative to their size, that is taken for randomness. Kernels that
add in any order differ by 1e-6 in single precision; dropout of 0.1 by 0.3, masking by 1."""

LEAST_RANDOM_IN_HALF = 0.03
"""The same in bf16 and fp16, whose kernels may round a sum apart in every layer."""

_OPTIONS = {
    "mask_ratio": "it masks patches: load its encoder as a plain ViT, as hf: does, or write a forward "
    "that keeps all patches in their order",
    "router_jitter_noise": "set its router_jitter_noise to 0",
    "moe_token_dropout": "set its moe_token_dropout to 0",
    "layerdrop": "set its layerdrop to 0",
    "encoder_layerdrop": "set its encoder_layerdrop to 0",
}
"""Settings of known models that draw at random, and what to do about each."""


def refuse_randomness(model: nn.Module, first: Any, again: Any) -> None:
    """Compare two answers of a backbone to one input.

    Args:
        model: The backbone, in eval mode.
        first, again: What it returned.

    Raises:
        BackboneError: They differ by more than kernels do: features that are stored, and what a task
            was trained on, would be others each time.
    """
    apart = 0.0
    for a, b in zip(_numbers(first), _numbers(again), strict=False):
        if a.shape != b.shape:
            raise _refusal(model, f"answers of shapes {tuple(a.shape)} and {tuple(b.shape)}")
        difference, size = (a.double() - b.double()).norm(), a.double().norm()
        allowed = LEAST_RANDOM_IN_HALF if a.dtype in HALF_PRECISION else LEAST_RANDOM
        # Infinite and undefined numbers are refused where they matter, and in their own words.
        if difference.isfinite() and size.isfinite() and float(difference) > allowed * float(size):
            apart = max(apart, float(difference / size.clamp_min(1e-30)))
    if apart:
        raise _refusal(model, f"two answers to one input differ by {apart:.1%} of their size")


def _numbers(output: Any) -> list[Tensor]:
    leaves = tree_leaves(dict(output) if hasattr(output, "keys") else output)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point() and t.numel()]


def _refusal(model: nn.Module, found: str) -> BackboneError:
    config = getattr(model, "config", None)
    known = [fix for name, fix in _OPTIONS.items() if getattr(config, name, 0)]
    return BackboneError(
        "a backbone answers at random",
        where=type(model).__name__,
        found=f"in eval mode {found}",
        fix="; ".join(known)
        or "switch off what it draws in eval mode: masking, dropout with training=True, noise",
    )
