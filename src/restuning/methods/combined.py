"""Res-Tuners beside one, two or three operations: the paper's 3 x 3 table (Table 2)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import cast

from torch import nn

from restuning._errors import UnknownNameError
from restuning.host import Host
from restuning.methods.method import (
    PAPER,
    RANK,
    START,
    Method,
    Options,
    add_drop_path,
    make_adapter,
)
from restuning.sites import Op, Site
from restuning.task import Task
from restuning.tuners import ResPrefix, ResPrompt, Scaled, Tuner
from restuning.tuners.learned_tokens import Query


def parse_combination(name: str) -> tuple[str, dict[str, str]]:
    """A method's name and its combination: `res-tuning[mha=prompt]` is `("res-tuning", ...)`.

    Raises:
        UnknownNameError: The combination is malformed.
    """
    match = re.fullmatch(r"res-tuning\[(.*)\]", name)
    if match is None:
        return name, {}
    combination: dict[str, str] = {}
    for part in match[1].split(","):
        op, _, kind = part.strip().partition("=")
        if op not in ("mha", "cross", "ffn", "block") or kind not in _KINDS or op in combination:
            raise UnknownNameError(
                "not a combination of Res-Tuners",
                where=name,
                found=part.strip() or "nothing",
                fix="write e.g. res-tuning[mha=prompt,ffn=adapter]; operations mha, cross, ffn, "
                "block, tuners adapter, prefix, prompt",
            )
        combination[op] = kind
    return "res-tuning", combination


def make_prefix(site: Site, options: Options) -> Tuner:
    """A Res-Prefix with the key width of the layer whose queries it takes."""
    query = _choose_query(site, options)
    # With fewer key heads than query heads keys are narrower than the stream.
    key_width = (
        site.projections.key_width if site.projections is not None and query == "mha" else site.dim
    )
    return ResPrefix(
        site.dim,
        length=options.get("rank", RANK),
        query=query,
        heads=_count_heads(site),
        zero=options.get("zero", True),
        width=None if key_width == site.dim else key_width,
    )


def make_prompt(site: Site, options: Options) -> Tuner:
    """A Res-Prompt with the layer's heads, of tokens of the sequence that the layer reads."""
    query = _choose_query(site, options)
    # Keys and values of cross-attention come from a sequence of another width.
    text = site.projections.context if site.projections is not None and query == "mha" else 0
    return ResPrompt(
        site.dim,
        length=options.get("rank", RANK),
        query=query,
        heads=_count_heads(site),
        width=text or None,
    )


def _choose_query(site: Site, options: Options) -> Query:
    """The layer's own queries; the stream itself where a modulated norm keeps them from being lent.

    There, keys of every time step would need the modulation of that step.
    """
    modulated = site.gated and site.projections is None
    return options.get("query") or ("stream" if modulated else "mha")


_KINDS = {"adapter": make_adapter, "prefix": make_prefix, "prompt": make_prompt}


def _count_heads(site: Site) -> int:
    # Where no attention was proved a prompt attends with one head of its own.
    heads = site.projections.heads if site.projections is not None else 1
    return heads if site.dim % heads == 0 else 1


def _tune_operations(default: dict[str, str]) -> Callable[[Host, nn.Linear | None, Options], Task]:
    """Res-Tuners beside several operations.

    Channel scales on MHA and FFN as soon as two operations are tuned and none on block: this
    reproduces the paper's printed sizes (482,644 dual, 676,300 tri; single without a scale).
    """

    def build_task(host: Host, head: nn.Linear | None, options: Options) -> Task:
        combination = options.get("combination", default)

        inside = {s.layer for s in host.sites.values() if s.op in combination and s.op != "block"}
        everywhere = "combination" not in options and set(combination.values()) == {"adapter"}

        def plan(site: Site) -> Tuner | None:
            # A convolutional layer has no MHA or FFN: what is tuned is its block.
            alone = everywhere and site.op == "block" and site.layer not in inside
            if site.op not in combination and not alone:
                return None
            tuner = _KINDS[combination.get(site.op, "adapter")](site, options)
            # By the parameter counts the paper prints; see above.
            form = "channel" if len(combination) > 1 and site.op != "block" else "none"
            form = options.get("scale", form)
            start = 1.0
            if options.get("zero", form != "none") and isinstance(tuner, ResPrompt):
                # A prompt's values are the layer's own map of it, never zero: its scale is.
                form, start = ("channel" if form in ("none", "gate") else form), 0.0
            tuner = tuner if form == "none" else Scaled(tuner, form, start=start)
            return add_drop_path(tuner, options)

        # What was written out must be there: pick refuses an operation that the backbone lacks.
        if not everywhere:
            for op in combination:
                host.sites.pick(cast(Op, op))
        layers = options.get("layers", slice(None))
        # Blocks are offered in any case, for convolutional layers; the plan turns the others down.
        sites = host.sites.pick(*cast("list[Op]", list(combination)), "block", layers=layers)
        return Task.inline(sites, plan, head)

    return build_task


ROWS: dict[str, Method] = {
    "res-tuning": Method(
        _tune_operations({"mha": "adapter", "ffn": "adapter"}),
        "dual: Res-Adapter beside MHA and FFN, channel scales (convolutions: beside each block)",
        f"{PAPER}, Tables 2b and 3a",
        START,
        unused=("residual",),
    ),
    "res-tuning-single": Method(
        _tune_operations({"ffn": "prompt"}),
        "Res-Prompt beside FFN",
        f"{PAPER}, Table 2a",
        START,
        ("residual",),
    ),
    "res-tuning-tri": Method(
        _tune_operations({"mha": "adapter", "ffn": "adapter", "block": "adapter"}),
        "dual, and a Res-Adapter beside every block",
        f"{PAPER}, Table 2c",
        START,
        unused=("residual",),
    ),
}
