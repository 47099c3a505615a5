"""Linear maps as backbones keep them: `nn.Linear`, and GPT-2's `Conv1D` with its weight transposed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a plain linear map `x W^T + b`."""
    if isinstance(module, nn.Linear):
        return True
    weight = getattr(module, "weight", None)
    # By name: the class belongs to a library that this room does not import.
    return type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.dim() == 2


def weight_of(module: nn.Module) -> Tensor:
    """Its weight, `out in`."""
    weight: Any = module.weight
    return weight if isinstance(module, nn.Linear) else weight.t()


def width_in(module: nn.Module) -> int:
    """Width of what it reads."""
    return int(weight_of(module).shape[1])


def bias_of(module: nn.Module) -> Tensor | None:
    """Its bias, `out`, or None."""
    bias: Any = module.bias
    return bias
