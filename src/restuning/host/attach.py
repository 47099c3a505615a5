"""Which hooks a host needs where, as a list: `host.py` registers them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from restuning.host.hooks import (
    AddBeforeGate,
    AddDelta,
    AddDeltaToReaders,
    GatherOutputs,
    SaveStream,
)
from restuning.host.listeners import (
    RecordAttentionInputs,
    RecordMask,
    RecordPositionBias,
    RecordTimestep,
)
from restuning.sites import Site, Sites, returns_bias


def hooks_of(slot: str, model: nn.Module, sites: Sites) -> Iterator[tuple[str, Any]]:
    """`(module path, hook)` in the order they must be registered; `hook.after` is a forward hook.

    Args:
        slot: Of the host.
        model: The backbone.
        sites: Its sites.
    """
    steps = place_of("timestep", model)
    if steps is not None:
        yield "", RecordTimestep(slot, steps)
        yield "", GatherOutputs(slot)
    enters, leaves = _by(sites, "enter"), _by(sites, "leave")
    stems = {site.enter: (tap, site) for tap, site in sites.stems.items()}
    for path in dict.fromkeys(p for stem in stems for p in around(stem)):
        place = place_of("attention_mask", model.get_submodule(path))
        if place is not None:
            yield path, RecordMask(slot, place, not path)
    # Before `SaveStream` of the same module, which must note the stream with what was added.
    vias = dict.fromkeys(path for site in sites.values() for path in site.via)
    for path in vias:
        yield path, AddDeltaToReaders(slot, tuple(s for s in sites.values() if path in s.via))
    for path in dict.fromkeys([*enters, *stems]):
        tap, first = stems.get(path, ("", None))
        yield path, SaveStream(slot, tuple(enters.get(path, ())), tap, first)
    attentions = [s for s in sites.values() if s.op in ("mha", "cross")]
    for path in dict.fromkeys(s.maps.module if s.maps else s.module for s in attentions):
        relative = returns_bias(model.get_submodule(path))
        yield path, RecordAttentionInputs(slot, path, relative)
        if relative:
            yield path, RecordPositionBias(slot, path)
    gated = Sites(s for s in sites.values() if s.gated)
    for path, inside in _by(gated, "module").items():
        yield path, AddBeforeGate(slot, tuple(inside))
    for path, sites_here in leaves.items():
        yield path, AddDelta(slot, tuple(sites_here))


def _by(sites: Sites, attribute: str) -> dict[str, list[Site]]:
    found: dict[str, list[Site]] = {}
    for site in sites.values():
        found.setdefault(getattr(site, attribute), []).append(site)
    return found


def around(path: str) -> list[str]:
    """The modules around a path, the model ("") first."""
    names = path.split(".")
    return [".".join(names[:i]) for i in range(len(names))]


def place_of(name: str, module: nn.Module) -> int | None:
    """Where a module's forward takes an argument of this name; None where it does not."""
    names = list(inspect.signature(module.forward).parameters)
    return names.index(name) if name in names else None
