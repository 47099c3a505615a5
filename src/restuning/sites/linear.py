"""Linear maps as backbones keep them: `nn.Linear`, GPT-2's `Conv1D` with its weight transposed, and
maps whose weight is packed (8 or 4 bit), kept elsewhere until they run, or shared out among processes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from restuning._torch import is_composed, is_sharded, read_whole


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a plain linear map `x W^T + b`."""
    if isinstance(module, nn.Linear):
        return True
    weight = getattr(module, "weight", None)
    # By name: the class belongs to a library that this room does not import.
    return type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.dim() == 2


def is_plain(weight: Tensor) -> bool:
    """Whether a weight is there as floating-point numbers of its own shape, if in several processes."""
    return weight.is_floating_point() and (is_sharded(weight) or not is_composed(weight))


def read_weight(module: nn.Module) -> Tensor:
    """The weight of a linear map, `out in`.

    Cost: nothing; for a packed or offloaded weight one product with the identity, `in^2 out`; a sharded
        one is gathered, for which all processes must ask.
    """
    kept: Any = module.weight
    weight: Any = read_whole(kept)
    if not is_plain(weight) or (weight.is_meta and hasattr(module, "_hf_hook")):
        return _unpack_weight(module)
    # `Conv1D` keeps `in out`.
    return weight if isinstance(module, nn.Linear) else weight.t()


def width_in(module: nn.Module) -> int:
    """The number of channels that a linear map reads."""
    weight: Any = module.weight
    # A packed weight has another shape than the map.
    return int(module.in_features if isinstance(module, nn.Linear) else weight.shape[0])


def width_out(module: nn.Module) -> int:
    """The number of channels that a linear map returns."""
    weight: Any = module.weight
    return int(module.out_features if isinstance(module, nn.Linear) else weight.shape[1])


def read_bias(module: nn.Module) -> Tensor | None:
    """The bias of a linear map, `out`, or None."""
    bias: Any = module.bias
    if bias is not None and bias.is_meta and hasattr(module, "_hf_hook"):
        return _apply(module, torch.zeros(1, width_in(module), dtype=bias.dtype))[0]
    return None if bias is None else read_whole(bias)


PACKS_ITSELF = "support_avx512bf16_for_cpu"
"""Of a 4-bit map of bitsandbytes: whether it packs itself anew in a forward without gradients."""


def keep_backward(model: nn.Module) -> None:
    """Stop maps from packing themselves in a form that has no backward.

    On CPUs with bf16 instructions bitsandbytes repacks a 4-bit map in its first forward without
    gradients; afterwards gradients pass it by without a word, and its fingerprint is another.
    """
    for module in model.modules():
        if getattr(module, PACKS_ITSELF, False):
            setattr(module, PACKS_ITSELF, False)


def _unpack_weight(module: Any) -> Tensor:
    """Read a weight off what the map makes of the identity: right whatever its packing is."""
    numbers = [t for t in (module.weight, module.bias) if t is not None and t.is_floating_point()]
    identity = torch.eye(width_in(module), dtype=numbers[0].dtype if numbers else torch.float32)
    zero = torch.zeros_like(identity[:1])
    # Less what it makes of zero, its bias.
    return (_apply(module, identity) - _apply(module, zero)).t()


def _apply(module: Any, x: Tensor) -> Tensor:
    hook = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    # Accelerate's hook brings an offloaded weight to its device when `forward` is called.
    if device is None or not module.weight.is_meta:
        device = module.weight.device
    with torch.no_grad():
        # `forward`, not a call: hooks on the module are for streams.
        return module.forward(x.to(device))
