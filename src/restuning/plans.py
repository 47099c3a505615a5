"""Which tuner a named method puts at a site, from the options of `methods.build`."""

from __future__ import annotations

from typing import Any

from restuning.sites import Site
from restuning.tuners import DropPath, FilmAdapter, ResAdapter, ResPrefix, ResPrompt, Tuner

RANK = 10
"""Bottleneck, prefix and prompt length in every layer (paper, by its parameter counts)."""

Options = dict[str, Any]


def adapter(site: Site, options: Options) -> Tuner:
    """A Res-Adapter."""
    return ResAdapter(site.dim, rank=options.get("rank", RANK), zero=options.get("zero", True))


def film_adapter(site: Site, options: Options) -> Tuner:
    """One that knows the time step."""
    return FilmAdapter(
        site.dim, rank=options.get("rank", RANK), zero=options.get("zero", True),
        time_scale=options.get("time_scale", 1.0),
    )  # fmt: skip


def prefix(site: Site, options: Options) -> Tuner:
    """A Res-Prefix as wide as the layer's keys."""
    query = options.get("query", "mha")
    own = site.maps.key_width if site.maps is not None and query == "mha" else site.dim
    return ResPrefix(site.dim, length=options.get("rank", RANK), query=query, heads=_heads(site),
                     zero=options.get("zero", True), width=None if own == site.dim else own)  # fmt: skip


def prompt(site: Site, options: Options) -> Tuner:
    """A Res-Prompt, of tokens of the sequence that the layer reads."""
    query = options.get("query", "mha")
    text = site.maps.context if site.maps is not None and query == "mha" else 0
    return ResPrompt(site.dim, length=options.get("rank", RANK), query=query, heads=_heads(site),
                     width=text or None)  # fmt: skip


KINDS = {"adapter": adapter, "prefix": prefix, "prompt": prompt}


def _heads(site: Site) -> int:
    heads = site.maps.heads if site.maps is not None else 1
    return heads if site.dim % heads == 0 else 1


def dropped(tuner: Tuner, options: Options) -> Tuner:
    """The tuner, left out for some samples where that is asked for."""
    return DropPath(tuner, options["drop_path"]) if options.get("drop_path") else tuner
