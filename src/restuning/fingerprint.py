"""How a backbone is known again: by its class, its sites and its weights."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from restuning.sites import Sites

_CHECKPOINTED = "_checkpoint_wrapped_module."


def fingerprint(model: nn.Module, sites: Sites) -> dict[str, Any]:
    """Class, number of layers, widths, a digest of the sites and one of three tensors.

    Cost: a sha256 of the first, middle and last parameter by name.
    """
    named = _named(model)
    names = sorted(named)
    chosen = [names[0], names[len(names) // 2], names[-1]]
    return {
        "class": type(model).__name__,
        "layers": sites.layers,
        "widths": sorted({s.dim for s in sites.values()}),
        "sites": hashlib.sha256(
            "|".join(f"{s.name}:{s.dim}" for s in sites.values()).encode()
        ).hexdigest()[:16],
        "weights": _digest(named, chosen),
    }


def weights_digest(model: nn.Module) -> str:
    """sha256 over all parameters and buffers by name, 16 hexadecimal digits.

    What a feature store is keyed by: one changed weight changes every feature.

    Cost: reads every weight once, about 1 s a gigabyte.
    """
    named = _named(model) | {
        n.replace(_CHECKPOINTED, ""): b for n, b in model.named_buffers() if b.numel()
    }
    return _digest(named, sorted(named))


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its inputs: where its first parameter is."""
    return next(model.parameters()).device


def _named(model: nn.Module) -> dict[str, Tensor]:
    return {n.replace(_CHECKPOINTED, ""): p for n, p in model.named_parameters() if p.numel()}


def _digest(named: dict[str, Tensor], names: list[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        raw = named[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(name.encode() + raw.numpy().tobytes())
    return digest.hexdigest()[:16]
