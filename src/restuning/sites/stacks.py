"""Which repeated blocks are layers, where the stacks of an encoder-decoder begin, what a hierarchy is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from restuning.sites.site import Site


def parts(model: nn.Module, candidates: Iterable[str]) -> set[str]:
    """Candidates that are parts of one layer, not layers.

    T5 keeps self-attention, cross-attention and feed-forward of a layer in a list: inside another
    candidate, two or more members, no two of one class. (What a `Sequential` holds is a chain.)
    """
    known = set(candidates)
    found: set[str] = set()
    for path in known:
        container = path.rpartition(".")[0]
        owner = container.rpartition(".")[0]
        held = model.get_submodule(container)
        if owner not in known or not isinstance(held, nn.ModuleList):
            continue
        classes = [type(m) for m in held.children()]
        if len(classes) > 1 and len(set(classes)) == len(classes):
            found.add(path)
    return found


def starts(sites: Iterable[Site]) -> list[int]:
    """First layers of the stacks: 1, and that of a decoder, every layer of which reads across.

    Elsewhere a layer that reads across stands in the one stack (UNets, gated cross-attention).
    """
    known = list(sites)
    crossing = {s.layer for s in known if s.op == "cross"}
    found, before = [], None
    for site in (s for s in known if s.op == "block"):
        container = site.module.rpartition(".")[0]
        later = {s.layer for s in known if s.layer >= site.layer}
        begins = later <= crossing and site.layer == min(crossing)
        if before is None or (container != before and begins):
            found.append(site.layer)
        before = container
    return found


def is_hierarchy(sites: Iterable[Site]) -> bool:
    """Whether streams are maps, or change their width on the way."""
    blocks = [s for s in sites if s.op == "block"]
    return len({s.dim for s in blocks}) > 1 or any(s.layout != "b n d" for s in blocks)
