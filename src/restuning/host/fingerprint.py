"""How a backbone is known again: by its class, its sites and its weights.

Weights may be quantised (a tensor of several: packed values and scales) or offloaded (on the disk or
in memory elsewhere, `meta` until a module runs); both are read as what they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from restuning._torch import CHECKPOINT_PREFIX, inner_tensors, is_composed
from restuning.sites import Sites, is_plain


def fingerprint(model: nn.Module, sites: Sites) -> dict[str, Any]:
    """Class, number of layers, widths, a digest of the sites and one of three tensors.

    Cost: a sha256 of the first, middle and last parameter by name, and of two quantised ones.
    """
    named = _find_parameter_names(model)
    names = sorted(named)
    chosen = [names[0], names[len(names) // 2], names[-1]]
    packed = [n for n in names if not is_plain(model.get_parameter(named[n]))]
    # Norms and embeddings stay as they were: of quantised weights, two more.
    chosen += [packed[0], packed[len(packed) // 2]] if packed else []
    return {
        "class": type(model).__name__,
        "layers": sites.layers,
        "widths": sorted({s.dim for s in sites.values()}),
        "sites": hashlib.sha256(
            "|".join(f"{s.name}:{s.dim}" for s in sites.values()).encode()
        ).hexdigest()[:16],
        "weights": _digest(model, named, chosen),
    }


def weights_digest(model: nn.Module) -> str:
    """sha256 over all parameters and buffers by name, 16 hexadecimal digits.

    What a feature store is keyed by: one changed weight changes every feature.

    Cost: reads every weight once, about 1 s a gigabyte.
    """
    named = _find_parameter_names(model) | {
        n.replace(CHECKPOINT_PREFIX, ""): n for n, b in model.named_buffers() if b.numel()
    }
    return _digest(model, named, sorted(named))


def find_device(model: nn.Module) -> torch.device:
    """Where a model takes its inputs: where it runs, if its weights are kept elsewhere."""
    for module in model.modules():
        first = next(module.parameters(recurse=False), None)
        if first is None:
            continue
        runs_on = [
            d for h in _hooks(module) if (d := getattr(h, "execution_device", None)) is not None
        ]
        # The first module with weights of its own is the one that reads the input.
        return torch.device(runs_on[0]) if first.is_meta and runs_on else first.device
    return torch.device("cpu")


def is_offloaded(model: nn.Module) -> bool:
    """Whether weights are kept elsewhere until a module runs (Accelerate's hooks bring them)."""
    return any(
        bool(_hooks(module)) and any(p.is_meta for p in module.parameters(recurse=False))
        for module in model.modules()
    )


def _find_parameter_names(model: nn.Module) -> dict[str, str]:
    """Map the names that files know parameters by to their names in this model."""
    # A block in a checkpoint is the same block under a longer name.
    named = {n.replace(CHECKPOINT_PREFIX, ""): n for n, p in model.named_parameters() if p.numel()}
    if is_offloaded(model):
        # One tensor under two names is two on `meta`: the second is no parameter of its own.
        for tied in getattr(model, "all_tied_weights_keys", ()):
            named.pop(tied, None)
    return named


def _digest(model: nn.Module, named: dict[str, str], names: list[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        for part, tensor in _parts(name, _value(model, named[name])):
            # As bytes: numpy has no bfloat16.
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            # With its name, so that two tensors that change places are seen.
            digest.update(part.encode() + raw.numpy().tobytes())
    return digest.hexdigest()[:16]


def _hooks(module: nn.Module) -> list[Any]:
    """Accelerate's hooks on a module."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def _value(model: nn.Module, name: str) -> Tensor:
    """A tensor, from where it is kept until its module runs."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    value = getattr(module, leaf)
    weights_maps = [
        h.weights_map for h in _hooks(module) if getattr(h, "weights_map", None) is not None
    ]
    return weights_maps[0][leaf] if value.is_meta and weights_maps else value


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A quantised weight's packed values and scales by name; a plain tensor as it is."""
    if is_composed(tensor):
        for part, inner in inner_tensors(tensor).items():
            yield from _parts(f"{name}.{part}", inner)
        return
    yield name, tensor
    # bitsandbytes keeps scales as attributes of its packed weights.
    state = getattr(tensor, "quant_state", None)
    beside = {"SCB": getattr(tensor, "SCB", None)} if state is None else state.as_dict()
    for part, value in beside.items():
        if isinstance(value, (Tensor, float)):
            yield f"{name}.{part}", torch.as_tensor(value)
