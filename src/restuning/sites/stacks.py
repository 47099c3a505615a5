"""Which repeated blocks are layers, and where the stacks of an encoder-decoder begin."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from restuning.sites.site import Site


def parts(model: nn.Module, candidates: Iterable[str]) -> set[str]:
    """Candidates that are parts of one layer, not layers.

    T5 keeps self-attention, cross-attention and feed-forward of a layer in a list: inside another
    candidate, two or more members, no two of one class.
    """
    known = set(candidates)
    found: set[str] = set()
    for path in known:
        container = path.rpartition(".")[0]
        owner = container.rpartition(".")[0]
        if owner not in known:
            continue
        classes = [type(m) for m in model.get_submodule(container).children()]
        if len(classes) > 1 and len(set(classes)) == len(classes):
            found.add(path)
    return found


def starts(sites: Iterable[Site]) -> list[int]:
    """First layers of the stacks: 1, and that of a decoder which reads an encoder across."""
    crossing = {s.layer for s in sites if s.op == "cross"}
    found, before = [], None
    for site in sites:
        if site.op != "block":
            continue
        container = site.module.rpartition(".")[0]
        if before is None or (container != before and site.layer in crossing):
            found.append(site.layer)
        before = container
    return found
