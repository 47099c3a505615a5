"""The named methods as plans: one readable table, with the paper's defaults.

`build("res-tuning", host, num_classes=100)` gives a task. A combination of the paper's 3 x 3 table
is written as `res-tuning[mha=prompt,ffn=adapter]`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from torch import nn

from restuning._errors import NoSitesError, UnknownNameError
from restuning.host import Host
from restuning.plans import KINDS, RANK, Options, adapter, dropped, film_adapter, prefix, prompt
from restuning.sites import POOLS, Site
from restuning.task import Task
from restuning.tuners import (
    ResAdapter,
    ResPrompt,
    Scaled,
    StemPrompt,
    Tuner,
)
from restuning.unet_bypass import UNetBypass

PAPER = "Jiang et al. 2023, arXiv 2310.19859"
# The authors' code starts tuners at random (Xavier). On a pretrained ViT-Ti that destroys the features:
# on caltech101, six epochs at 5e-3 end at 1 % on validation, and at 75 % from no change
# (`recipes/paper/start.py`). So named methods start as no change; `zero=False` is the authors' start.


@dataclass(frozen=True, slots=True)
class Method:
    """One row of the table.

    Attributes:
        build: `(host, head, options) -> Task`.
        what: One line.
        source: Where the defaults come from.
    """

    build: Callable[[Host, nn.Linear | None, Options], Task]
    what: str
    source: str


def build(name: str, host: Host, num_classes: int | None = None, **options: Any) -> Task:
    """Build a task by the name of its method.

    Args:
        name: A name of `names()`, or `res-tuning[mha=...,cross=...,ffn=...,block=...]` with
            adapter, prefix or prompt.
        host: The frozen backbone.
        num_classes: Width of a new linear head; None for no head.
        options: `residual` (of a bypass: its state is added to the backbone's own last stream;
            the default where there is no head, for generation), `rank` (bottleneck or length),
            `scale` (a form of `Scaled`), `zero` (start as no change: the default wherever it costs
            no parameter), `query` ("mha" or "stream"), `layers` (a slice or numbers from 1),
            `drop_path` (probability), `pool` ("cls", "mean", "last", "all", "own").
            On diffusion models also: `film` (tuners of a bypass know the time step: the default),
            `time_scale` (see `FilmAdapter`), `kernel` and `form` (see `UNetBypass`).

    Raises:
        UnknownNameError: No such method, tuner, option or readout.
        NoSitesError: The backbone has no site of an operation the method tunes.
    """
    base, combination = _parsed(name)
    if base not in METHODS:
        near = get_close_matches(base, METHODS, n=3)
        raise UnknownNameError(
            "no such method",
            where=name,
            found=f"did you mean {' or '.join(near)}?" if near else "",
            fix=f"one of: {', '.join(METHODS)}",
        )
    known = {"rank", "scale", "zero", "query", "layers", "drop_path", "pool", "residual"}
    known |= {"film", "time_scale", "kernel", "form"} if host.has_time else set()
    if options.keys() - known:
        raise UnknownNameError(
            "no such option",
            where=", ".join(sorted(options.keys() - known)),
            fix=f"{name} takes {', '.join(sorted(known))}",
        )
    if options.get("pool") not in (None, *POOLS):
        raise UnknownNameError(
            "no such readout", where=str(options["pool"]), fix=f"one of: {', '.join(POOLS)}"
        )
    if combination:
        options = {**options, "combination": combination}
    head = nn.Linear(host.dim, num_classes) if num_classes else None
    if head is not None:
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
    task = METHODS[base].build(host, head, options)
    task.method, task.pool = name, options.get("pool")
    if head is not None:
        # A bank knows no host: what a task reads must be readable from the task.
        task.pool = task.pool or host.readout_rule.pool
    return task


def names() -> list[str]:
    """The methods, in the order of the table."""
    return list(METHODS)


def table() -> list[tuple[str, str, str]]:
    """Name, what it is, and where its defaults come from."""
    return [(name, method.what, method.source) for name, method in METHODS.items()]


def _parsed(name: str) -> tuple[str, dict[str, str]]:
    match = re.fullmatch(r"res-tuning\[(.*)\]", name)
    if match is None:
        return name, {}
    combination: dict[str, str] = {}
    for part in match[1].split(","):
        op, _, kind = part.strip().partition("=")
        if op not in ("mha", "cross", "ffn", "block") or kind not in KINDS or op in combination:
            raise UnknownNameError(
                "not a combination of Res-Tuners",
                where=name,
                found=part.strip() or "nothing",
                fix="write e.g. res-tuning[mha=prompt,ffn=adapter]; operations mha, cross, ffn, "
                "block, tuners adapter, prefix, prompt",
            )
        combination[op] = kind
    return "res-tuning", combination


def _combined(default: dict[str, str]) -> Callable[[Host, nn.Linear | None, Options], Task]:
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
            tuner = KINDS[combination.get(site.op, "adapter")](site, options)
            form = "channel" if len(combination) > 1 and site.op != "block" else "none"
            form = options.get("scale", form)
            start = 1.0
            if options.get("zero", form != "none") and isinstance(tuner, ResPrompt):
                # A prompt's values are the layer's own map of it, never zero: its scale is.
                form, start = ("channel" if form in ("none", "gate") else form), 0.0
            tuner = tuner if form == "none" else Scaled(tuner, form, start=start)
            return dropped(tuner, options)

        if not everywhere:
            for op in combination:
                host.sites.pick(op)  # type: ignore[arg-type]
        layers = options.get("layers", slice(None))
        sites = host.sites.pick(*combination, "block", layers=layers)  # type: ignore[arg-type]
        return Task.inline(sites, plan, head)

    return build_task


def _embedded(op: str, make: Callable[[Site, Options], Tuner]) -> Callable[..., Task]:
    def build_task(host: Host, head: nn.Linear | None, options: Options) -> Task:
        sites = host.sites.pick(op, layers=options.get("layers", slice(None)))  # type: ignore[arg-type]
        return Task.inline(sites, lambda site: dropped(make(site, options), options), head)

    return build_task


def _bypass(horizontal: bool, vertical: bool) -> Callable[..., Task]:
    def build_task(host: Host, head: nn.Linear | None, options: Options) -> Task:
        def plan(site: Site) -> Tuner:
            film = options.get("film", host.has_time)
            tuner: Tuner = (film_adapter if film else adapter)(site, options)
            form = options.get("scale", "none")
            return dropped(tuner if form == "none" else Scaled(tuner, form), options)

        rule = host.readout_rule
        if head is None and any(s.op == "stage" for s in host.sites.values()):
            bypass = UNetBypass.plan(
                host.sites, plan if horizontal else None, plan if vertical else None,
                kernel=options.get("kernel", 1), form=options.get("form", "correct"),
            )  # fmt: skip
            return Task(bypass=bypass)
        # Without head and readout the state takes the place of the last stream, not of a feature.
        pool = options.get("pool") or (None if head is None else rule.pool)
        own = rule.dim if pool == "own" else None
        return Task.bypass_of(
            host.sites, plan if horizontal else None, head, vertical=plan if vertical else None,
            own=own, residual=options.get("residual", head is None),
        )  # fmt: skip

    return build_task


def _linear(host: Host, head: nn.Linear | None, options: Options) -> Task:
    return Task(head=head)


def _full(host: Host, head: nn.Linear | None, options: Options) -> Task:
    return Task(head=head, weights={n: p.clone() for n, p in host.model.named_parameters()})


def _bitfit(host: Host, head: nn.Linear | None, options: Options) -> Task:
    weights = {
        n: p.clone() for n, p in host.model.named_parameters() if n.endswith("bias") and p.dim() < 2
    }
    return Task(head=head, weights=weights)


def _vpt_shallow(host: Host, head: nn.Linear | None, options: Options) -> Task:
    site = host.sites.pick("block", layers=[1])["block.1"]
    if site.layout != "b n d":
        raise NoSitesError(
            "tokens cannot be appended to a map", where=type(host.model).__name__,
            found=f"a stream {site.layout}", fix="use res-tuning or res-tuning-bypass",
        )  # fmt: skip
    dim = site.dim
    return Task(head=head, tuners={"block.0": StemPrompt(dim, length=options.get("rank", RANK))})


METHODS: dict[str, Method] = {
    "linear": Method(_linear, "a linear head on the frozen feature", "-"),
    "res-tuning": Method(
        _combined({"mha": "adapter", "ffn": "adapter"}),
        "dual: Res-Adapter beside MHA and FFN, channel scales (convolutions: beside each block)",
        f"{PAPER}, Tables 2b and 3a",
    ),
    "res-tuning-bypass": Method(
        _bypass(True, True), "side network, horizontal and vertical Res-Adapters, no gradient "
        "in the backbone", f"{PAPER}, Table 3b",
    ),
    "res-tuning-single": Method(
        _combined({"ffn": "prompt"}), "Res-Prompt beside FFN", f"{PAPER}, Table 2a"
    ),
    "res-tuning-tri": Method(
        _combined({"mha": "adapter", "ffn": "adapter", "block": "adapter"}),
        "dual, and a Res-Adapter beside every block", f"{PAPER}, Table 2c",
    ),
    "bypass-horizontal": Method(
        _bypass(True, False), "bypass with horizontal tuners only", f"{PAPER}, Table 3b"
    ),
    "bypass-vertical": Method(
        _bypass(False, True), "bypass with vertical tuners only", f"{PAPER}, Table 3b"
    ),
    "full": Method(_full, "all backbone weights, as a trained copy", "-"),
    "bitfit": Method(
        _bitfit, "the backbone's biases, as a trained copy", "Ben Zaken et al. 2022"
    ),
    "prefix": Method(
        _embedded("mha", lambda s, o: Scaled(prefix(s, {"zero": False, **o}), "exact")),
        "prefix tuning: Res-Prefix on MHA with the exact lambda", f"Li and Liang 2021; {PAPER}",
    ),
    "vpt-deep": Method(
        _embedded("mha", lambda s, o: Scaled(prompt(s, o), "exact")),
        "VPT-deep: Res-Prompt on MHA with the exact lambda", f"Jia et al. 2022; {PAPER}",
    ),
    "vpt-shallow": Method(
        _vpt_shallow, "VPT-shallow: tokens appended to the embedding output", "Jia et al. 2022"
    ),
    "adapter": Method(
        _embedded("ffn", lambda s, o: ResAdapter(
            s.dim, rank=o.get("rank", RANK), reads="output", zero=o.get("zero", True))),
        "sequential adapter after FFN (reads OP's output)", f"Pfeiffer et al. 2021; {PAPER} 1.3",
    ),
    "adaptformer": Method(
        _embedded("ffn", lambda s, o: ResAdapter(
            s.dim, rank=o.get("rank", 64), activation="relu", zero=True, factor=0.1)),
        "AdaptFormer-64: a parallel ReLU adapter beside FFN, scale 0.1", "Chen et al. 2022",
    ),
}  # fmt: skip
