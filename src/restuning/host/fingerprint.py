"""How a backbone is known again: by its class, its sites and its weights.

A fingerprint reads three tensors, and is what a task is told apart by at once; a digest reads all of
them. What both mean by a backbone's weights is `weights.py`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from restuning._torch import CHECKPOINT_PREFIX, is_sharded
from restuning.host.weights import (
    Weight,
    class_name,
    hooks_of_accelerate,
    list_contents,
    reshard,
)
from restuning.sites import Sites, is_plain


def fingerprint(model: nn.Module, sites: Sites, *, merged: bool = True) -> dict[str, Any]:
    """Class, number of layers, widths, a digest of the sites and one of three tensors.

    Where LoRA of PEFT is in use the weights are those with it merged into them, so that both are one
    backbone; `adapters` then names it, and is not compared.

    Args:
        model: The backbone.
        sites: Its sites.
        merged: False for the weights and adapters apart, as files of before have them.

    Cost: a sha256 of the first, middle and last parameter by name, and of two quantised ones.
    """
    reshard(model)
    contents = list_contents(model, merged=merged)
    said = _fingerprint(class_name(model), sites, contents.weights)
    named = Counter(list_contents(model).adapters.values())
    if not named or not merged:
        return said
    return {**said, ADAPTERS: "; ".join(f"{what} on {n} maps" for what, n in sorted(named.items()))}


ADAPTERS = "adapters"
"""Entry of a fingerprint that is told and not compared: adapters in use that others put into the backbone."""


def earlier_fingerprint(model: nn.Module, sites: Sites) -> dict[str, Any]:
    """The fingerprint that files were given before wrappers were looked through.

    Of a model without wrappers it is the same.
    """
    reshard(model)
    weights = []
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        short = name.replace(CHECKPOINT_PREFIX, "")
        weights.append(Weight.kept_in(module, leaf, short, "parameter", parameter))
    return _fingerprint(type(model).__name__, sites, weights)


def _fingerprint(kind: str, sites: Sites, weights: Iterable[Weight]) -> dict[str, Any]:
    named = {w.name: w for w in weights if w.kind == "parameter" and w.kept.numel()}
    names = sorted(named)
    chosen = [names[0], names[len(names) // 2], names[-1]]
    packed = [n for n in names if not (is_plain(named[n].kept) or is_sharded(named[n].kept))]
    # Norms and embeddings stay as they were: of quantised weights, two more.
    chosen += [packed[0], packed[len(packed) // 2]] if packed else []
    return {
        "class": kind,
        "layers": sites.layers,
        "widths": sorted({s.dim for s in sites.values()}),
        "sites": hashlib.sha256(
            "|".join(f"{s.name}:{s.dim}" for s in sites.values()).encode()
        ).hexdigest()[:16],
        "weights": _digest(named[n] for n in chosen),
    }


def weights_digest(model: nn.Module) -> str:
    """sha256 over all parameters and buffers by name, 16 hexadecimal digits.

    What a feature store is keyed by: one changed weight changes every feature. Also of buffers that
    files do not keep. Of a plain model it is what it always was; wrappers and adapters that compute
    nothing do not change it.

    Cost: reads every weight once, about 1 s a gigabyte.
    """
    reshard(model)
    contents = list_contents(model)
    weights = sorted(contents.weights, key=lambda weight: weight.name)
    beside = [f"{name} {setting}" for name, setting in sorted(contents.adapters.items())]
    return _digest(weights, beside)


def full_digest(model: nn.Module, *, merged: bool = True) -> str:
    """sha256 over all parameters and buffers that files keep, 64 hexadecimal digits.

    Of each tensor its names, shape, dtype and bytes; of packed ones all parts. LoRA in use counts as
    merged into its weight; of layers with other adapters which are in use, at what scale. What a task file tells its backbone by. Buffers that a model makes
    by itself (positions, masks) are left out: two machines may round a sine differently.

    Args:
        model: The backbone.
        merged: False for LoRA apart from its weights, as files of before have it.

    Cost: reads every weight once, about 1 s a gigabyte.
    """
    reshard(model)
    contents = list_contents(model, merged=merged)
    lines = [f"{n} {setting}" for n, setting in contents.adapters.items()]
    hashes: dict[str, str] = {}
    for weight in contents.weights:
        if weight.kind != "made":
            hashes[weight.name] = _hash(weight)
    # Whether two equal tensors are one does not change what is computed.
    hashes |= {name: hashes[first] for name, first in contents.shared.items() if first in hashes}
    lines += [f"{name} {digest}" for name, digest in hashes.items()]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def find_device(model: nn.Module) -> torch.device:
    """Where a model takes its inputs: where it runs, if its weights are kept elsewhere."""
    for module in model.modules():
        first = next(module.parameters(recurse=False), None)
        if first is None:
            continue
        hooks = hooks_of_accelerate(module)
        runs_on = [d for h in hooks if (d := getattr(h, "execution_device", None)) is not None]
        # The first module with weights of its own is the one that reads the input.
        return torch.device(runs_on[0]) if first.is_meta and runs_on else first.device
    return torch.device("cpu")


def _bytes(tensor: Tensor) -> Any:
    """A tensor's bytes in order."""
    # As uint8: numpy has no bfloat16.
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _digest(weights: Iterable[Weight], beside: Iterable[str] = ()) -> str:
    digest = hashlib.sha256()
    for weight in weights:
        for part, tensor in weight.parts():
            # With its name, so that two tensors that change places are seen.
            digest.update(part.encode())
            digest.update(_bytes(tensor))
    for line in beside:
        digest.update(line.encode())
    return digest.hexdigest()[:16]


def _hash(weight: Weight) -> str:
    digest = hashlib.sha256()
    for part, tensor in weight.parts():
        own = part.removeprefix(weight.name)
        digest.update(f"{own} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()
