"""Published tuning of one operation, as the tuner that is equal to it (the paper's section 1)."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from restuning._errors import NoSitesError
from restuning.host import Host
from restuning.methods.combined import make_prefix, make_prompt
from restuning.methods.method import PAPER, RANK, START, Method, Options, add_drop_path
from restuning.sites import Op, Site
from restuning.task import Task
from restuning.tuners import ResAdapter, Scaled, StemPrompt, Tuner


def _tune_each(ops: tuple[Op, ...], make: Callable[[Site, Options], Tuner]) -> Callable[..., Task]:
    def build_task(host: Host, head: nn.Linear | None, options: Options) -> Task:
        sites = host.sites.pick(*ops, layers=options.get("layers", slice(None)))
        return Task.inline(sites, lambda site: add_drop_path(make(site, options), options), head)

    return build_task


def _build_vpt_shallow(host: Host, head: nn.Linear | None, options: Options) -> Task:
    # Tokens join before the first block: at its width, and only where streams have tokens.
    site = host.sites.pick("block", layers=[1])["block.1"]
    if site.layout != "b n d":
        raise NoSitesError(
            "tokens cannot be appended to a map",
            where=type(host.model).__name__,
            found=f"a stream {site.layout}",
            fix="use res-tuning or res-tuning-bypass",
        )
    dim = site.dim
    return Task(head=head, tuners={"block.0": StemPrompt(dim, length=options.get("rank", RANK))})


ROWS: dict[str, Method] = {
    "prefix": Method(
        # Published prefixes start at random; the exact lambda is the share of attention they take.
        _tune_each(("mha",), lambda s, o: Scaled(make_prefix(s, {"zero": False, **o}), "exact")),
        "prefix tuning: Res-Prefix on MHA with the exact lambda",
        f"Li and Liang 2021; {PAPER}",
        START,
        ("scale", "residual"),
    ),
    "vpt-deep": Method(
        _tune_each(("mha",), lambda s, o: Scaled(make_prompt(s, o), "exact")),
        "VPT-deep: Res-Prompt on MHA with the exact lambda",
        f"Jia et al. 2022; {PAPER}",
        unused=("scale", "residual"),
    ),
    "vpt-shallow": Method(
        _build_vpt_shallow,
        "VPT-shallow: tokens appended to the embedding output",
        "Jia et al. 2022",
        unused=("scale", "query", "layers", "drop_path", "residual"),
    ),
    "adapter": Method(
        _tune_each(
            ("ffn",),
            lambda s, o: ResAdapter(
                s.dim, rank=o.get("rank", RANK), reads="output", zero=o.get("zero", True)
            ),
        ),
        "sequential adapter after FFN (reads OP's output)",
        f"Pfeiffer et al. 2021; {PAPER} 1.3",
        START,
        ("scale", "query", "residual"),
    ),
    "houlsby": Method(
        _tune_each(
            ("mha", "ffn"),
            lambda s, o: ResAdapter(
                s.dim, rank=o.get("rank", 64), reads="output", zero=o.get("zero", True)
            ),
        ),
        "sequential adapters after MHA and FFN, bottleneck 64",
        "Houlsby et al. 2019, arXiv 1902.00751, section 3.2",
        START,
        ("scale", "query", "residual"),
    ),
    "adaptformer": Method(
        _tune_each(
            ("ffn",),
            lambda s, o: ResAdapter(
                s.dim,
                rank=o.get("rank", 64),
                activation="relu",
                zero=o.get("zero", True),
                factor=0.1,
            ),
        ),
        "AdaptFormer-64: a parallel ReLU adapter beside FFN, scale 0.1",
        "Chen et al. 2022",
        START,
        ("scale", "query", "residual"),
    ),
}
