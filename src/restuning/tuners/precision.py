"""Tuners train in fp32, whatever precision the stream beside them has."""

from __future__ import annotations

from torch import Tensor, nn

from restuning.runtime.precision import HALF_PRECISION, is_autocast_to


def in_own_precision(tuner: nn.Module, x: Tensor) -> Tensor:
    """A stream of a backbone in half precision, in the precision of what reads it.

    Small steps vanish in bf16 and small gradients in fp16. Under autocast a backbone in fp32 gives
    streams in half precision as well, and autocast itself sees to the products.

    Args:
        tuner: A tuner, or a side network of tuners.
        x: What it reads.
    """
    if x.dtype not in HALF_PRECISION or is_autocast_to(x.dtype, x.device):
        return x
    weight = next((p for p in tuner.parameters() if p.is_floating_point()), None)
    return x if weight is None else x.to(weight.dtype)
