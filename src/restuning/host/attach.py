"""Which hooks a host needs where, as a list: `host.py` registers them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from restuning.host.hooks import (
    AddBeforeGate,
    AddDelta,
    AddDeltaToReaders,
    AddToMap,
    GatherOutputs,
    SaveStream,
)
from restuning.host.listeners import (
    RecordAttentionInputs,
    RecordMask,
    RecordPositionBias,
    RecordTimestep,
)
from restuning.sites import Sites, returns_bias


def list_hooks(slot: str, model: nn.Module, sites: Sites) -> Iterator[tuple[str, Any]]:
    """`(module path, hook)` in the order they must be registered; see the picture in `hooks.py`.

    `hook.after` says whether it runs after its module (a forward hook) or before it.

    Args:
        slot: The host's, under which this thread keeps the record of its call.
        model: The backbone.
        sites: Its sites.
    """
    timestep = find_argument("timestep", model)
    if timestep is not None:
        yield "", RecordTimestep(slot, timestep)
        # Streams set side by side after the last block are answered where the model returns.
        yield "", GatherOutputs(slot)
    # Before all others on the same module: a tuner that reads an operation's output reads it with these.
    for path, here in _group(sites.linear, "module").items():
        yield path, AddToMap(slot, tuple(here))
    stems = {site.enter: (tap, site) for tap, site in sites.stems.items()}
    # A model and its stacks are given masks before any of their blocks runs.
    for path in dict.fromkeys(p for stem in stems for p in enclosing_modules(stem)):
        mask = find_argument("attention_mask", model.get_submodule(path))
        if mask is not None:
            yield path, RecordMask(slot, mask, outermost=not path)
    # Before `SaveStream` of the same module, which must save the stream with what was added.
    for path in dict.fromkeys(path for site in sites.values() for path in site.via):
        yield path, AddDeltaToReaders(slot, tuple(s for s in sites.values() if path in s.via))
    # A dict in place of a set keeps the order: torch runs the hooks of a module as registered.
    entered = _group(sites, "enter")
    for path in dict.fromkeys([*entered, *stems]):
        tap, first = stems.get(path, ("", None))
        yield path, SaveStream(slot, tuple(entered.get(path, ())), tap, first)
    # Masks and caches are given to the whole attention; in a post-norm layer (BERT) a site's module
    # is only its inner part, and the projections know the whole one.
    attentions = [s for s in sites.values() if s.op in ("mha", "cross")]
    for path in dict.fromkeys(
        s.projections.module if s.projections else s.module for s in attentions
    ):
        relative = returns_bias(model.get_submodule(path))
        yield path, RecordAttentionInputs(slot, path, relative)
        if relative:
            yield path, RecordPositionBias(slot, path)
    gated = Sites(s for s in sites.values() if s.gated)
    for path, here in _group(gated, "module").items():
        yield path, AddBeforeGate(slot, tuple(here))
    for path, here in _group(sites, "leave").items():
        yield path, AddDelta(slot, tuple(here))


def _group(sites: Mapping[str, Any], attribute: str) -> dict[str, list[Any]]:
    """Sites by the path of one of their modules: one hook serves all sites there."""
    groups: dict[str, list[Any]] = {}
    for site in sites.values():
        groups.setdefault(getattr(site, attribute), []).append(site)
    return groups


def enclosing_modules(path: str) -> list[str]:
    """The modules around a path, the model ("") first."""
    names = path.split(".")
    return [".".join(names[:i]) for i in range(len(names))]


def find_argument(name: str, module: nn.Module) -> int | None:
    """The place of an argument in a module's forward; None where it takes none of this name."""
    names = list(inspect.signature(module.forward).parameters)
    return names.index(name) if name in names else None
