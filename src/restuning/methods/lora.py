"""LoRA: two narrow maps beside linear maps of the backbone, chosen by what those are for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from restuning.host import Host
from restuning.methods.method import Method, Options, add_drop_path
from restuning.sites import LinearSite
from restuning.task import Task, lora_beside
from restuning.tuners import Tuner

RANK = 8
"""PEFT's default, and the rank with which NOAH and V-PETL Bench train ViT-B/16 on VTAB-1K."""

TARGETS = ("qkv",)
"""Queries, keys and values, as one map where the backbone has one."""


def parse_targets(targets: Any) -> tuple[str, ...]:
    """Roles from `q+v`, `q,v` or a list."""
    if isinstance(targets, str):
        return tuple(t.strip() for t in targets.replace(",", "+").split("+") if t.strip())
    return tuple(targets) if isinstance(targets, Iterable) else ()


def make_lora(site: LinearSite, options: Options) -> Tuner:
    """LoRA of a site's widths; beside a convolution with its kernel."""
    common: dict[str, Any] = {
        "rank": options.get("rank", RANK),
        "alpha": options.get("alpha"),
        "rslora": bool(options.get("rslora", False)),
        "dropout": options.get("dropout", 0.0),
        "zero": bool(options.get("zero", True)),
    }
    return lora_beside(site, **common)


def _build_lora(host: Host, head: nn.Linear | None, options: Options) -> Task:
    targets = parse_targets(options.get("targets", TARGETS))
    sites = host.sites.linear.pick(*targets, layers=options.get("layers", slice(None)))
    tuners = {n: add_drop_path(make_lora(site, options), options) for n, site in sites.items()}
    return Task(tuners=tuners, head=head)


ROWS: dict[str, Method] = {
    "lora": Method(
        _build_lora,
        "LoRA of rank 8 beside linear maps: q, k and v, or `targets`",
        "Hu et al. 2021, arXiv 2106.09685; PEFT's defaults, alpha = rank",
        ("targets", "alpha", "rslora", "dropout", "zero"),
        unused=("scale", "query", "residual"),
    ),
}
"""One row: what differs between uses of LoRA is where it stands."""
