"""The paper's bypass, with both of its sides and with one of them (Table 3b)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from restuning._errors import NoSitesError, UnknownNameError
from restuning.bypass import Bypass, UNetBypass
from restuning.host import Extractor
from restuning.methods.method import (
    PAPER,
    START,
    Method,
    Options,
    add_drop_path,
    make_adapter,
    make_film_adapter,
)
from restuning.sites import Site
from restuning.task import Task
from restuning.tuners import Scaled, Tuner


def _run_beside(horizontal: bool, vertical: bool) -> Callable[..., Task]:
    def build_task(host: Extractor, head: nn.Linear | None, options: Options) -> Task:
        def plan(site: Site) -> Tuner:
            # On a diffusion model what helps depends on the time step, which film adapters know.
            film = options.get("film", host.has_time)
            tuner: Tuner = (make_film_adapter if film else make_adapter)(site, options)
            form = options.get("scale", "none")
            return add_drop_path(tuner if form == "none" else Scaled(tuner, form), options)

        rule = host.readout_rule
        if head is None and any(s.op == "stage" for s in host.sites.values()):
            return Task(
                side=UNetBypass.plan(
                    host.sites,
                    plan if horizontal else None,
                    plan if vertical else None,
                    kernel=options.get("kernel", 1),
                    form=options.get("form", "correct"),
                )
            )
        # Without head and readout the state takes the place of the last stream, not of a feature.
        pool = options.get("pool") or (None if head is None else rule.pool)
        # x_L is then the backbone's own feature, which may be wider than its last stream.
        own = rule.dim if pool == "own" else None
        bypass = Bypass.plan(
            host.sites,
            plan if horizontal else None,
            plan if vertical else None,
            own=own,
            # Without a head the start must be the backbone's own output, to the last bit.
            residual=options.get("residual", head is None),
        )
        if options.get("taps"):
            bypass = _keep_taps(bypass, options["taps"])
        if options.get("gate") is not None:
            _fix_gate(bypass, float(options["gate"]))
        return Task(side=bypass, head=head)

    return build_task


def _keep_taps(bypass: Bypass, layers: Iterable[int]) -> Bypass:
    """Make the same bypass on fewer taps: those after the layers given, the first and the last."""
    last = len(bypass.taps) - 1
    wrong = [n for n in layers if not 1 <= n <= last]
    if wrong:
        raise NoSitesError(
            "no such tap",
            where=f"taps={wrong}",
            found=f"layers 1 to {last}",
            fix="give layers from 1",
        )
    # The state ends at the last tap, from which the readout reads.
    numbers = sorted({*layers, last})
    across, below = (
        [t if isinstance(t := side[n - 1], Tuner) else None for n in numbers]
        for side in (bypass.horizontal, bypass.vertical)
    )
    return Bypass(
        [bypass.taps[0], *[bypass.taps[n] for n in numbers]],
        [bypass.dims[0], *[bypass.dims[n] for n in numbers]],
        across,
        below,
        bypass.residual,
    )


def _fix_gate(bypass: Bypass, value: float) -> None:
    """Set the lambda of every layer to one value and keep it from being learned."""
    if not 0 < value < 1:
        raise UnknownNameError(
            "lambda out of its range",
            where="gate",
            found=str(value),
            fix="give a number between 0 and 1",
        )
    with torch.no_grad():
        # Its logit: lambda is the sigmoid of the gate.
        bypass.gate.fill_(math.log(value / (1 - value)))
    bypass.gate.requires_grad_(False)


TAKES = ("taps", "gate", *START)
"""`taps`: layers (from 1) whose taps are kept; `gate`: a fixed lambda, the same in every layer."""


ROWS: dict[str, Method] = {
    "res-tuning-bypass": Method(
        _run_beside(True, True),
        "side network, horizontal and vertical Res-Adapters, no gradient in the backbone",
        f"{PAPER}, Table 3b",
        TAKES,
        unused=("query", "layers"),
        inside=False,
    ),
    "bypass-horizontal": Method(
        _run_beside(True, False),
        "bypass with horizontal tuners only",
        f"{PAPER}, Table 3b",
        TAKES,
        unused=("query", "layers"),
        inside=False,
    ),
    "bypass-vertical": Method(
        _run_beside(False, True),
        "bypass with vertical tuners only",
        f"{PAPER}, Table 3b",
        TAKES,
        unused=("query", "layers"),
        inside=False,
    ),
}
