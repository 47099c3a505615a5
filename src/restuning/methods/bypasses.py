"""The paper's bypass, with both of its sides and with one of them (Table 3b)."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from restuning.host import Host
from restuning.methods.method import PAPER, Method, Options, adapter, dropped
from restuning.sites import Site
from restuning.task import Task
from restuning.tuners import Scaled, Tuner


def _bypass(horizontal: bool, vertical: bool) -> Callable[..., Task]:
    def build_task(host: Host, head: nn.Linear | None, options: Options) -> Task:
        def plan(site: Site) -> Tuner:
            tuner: Tuner = adapter(site, options)
            form = options.get("scale", "none")
            return dropped(tuner if form == "none" else Scaled(tuner, form), options)

        rule = host.readout_rule
        # Without head and readout the state takes the place of the last stream, not of a feature.
        pool = options.get("pool") or (None if head is None else rule.pool)
        own = rule.dim if pool == "own" else None
        return Task.bypass_of(
            host.sites, plan if horizontal else None, head, vertical=plan if vertical else None,
            own=own, residual=options.get("residual", head is None),
        )  # fmt: skip

    return build_task


ROWS: dict[str, Method] = {
    "res-tuning-bypass": Method(
        _bypass(True, True), "side network, horizontal and vertical Res-Adapters, no gradient "
        "in the backbone", f"{PAPER}, Table 3b",
    ),
    "bypass-horizontal": Method(
        _bypass(True, False), "bypass with horizontal tuners only", f"{PAPER}, Table 3b"
    ),
    "bypass-vertical": Method(
        _bypass(False, True), "bypass with vertical tuners only", f"{PAPER}, Table 3b"
    ),
}  # fmt: skip
