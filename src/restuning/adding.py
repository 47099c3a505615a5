"""A tuner's delta added to what a module of the backbone returned."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from restuning._errors import TunerShapeError
from restuning.record import Call
from restuning.sites import Site, stream_in
from restuning.tuners import Tuner, at_time, real_tokens


def added_at(output: Any, tuner: Tuner, call: Call, site: Site) -> Any:
    """The output of a leave module with the tuner's delta added to its stream."""
    y = stream_in(output, site.part)
    assert y is not None
    if site.via:
        carried = call.carried.pop(site.name)
        return replaced(output, lambda y: y + carried, site.part)
    entered = call.entered.pop(site.name)
    x = y if tuner.reads == "output" or site.changes else entered
    if site.channels_first:
        x, y = x.movedim(1, -1), y.movedim(1, -1)
    grid = y.shape
    if y.dim() > 3 and not tuner.needs_grid:
        x, y = x.flatten(1, -2), y.flatten(1, -2)
    view = call.views.get(site.name) if tuner.needs_view else None
    if view is not None and view.maps.module in call.given:
        view = view.during(call.given[view.maps.module])
    try:
        with (
            real_tokens(call.mask(x, appended=True)) if tuner.mixes_tokens else nullcontext(),
            at_time(call.time) if call.time is not None else nullcontext(),
        ):
            total = tuner.added(y, x, view)
    except TunerShapeError as error:
        where = f"{error.where} at {site.name}"
        raise TunerShapeError(error.what, where=where, found=error.found, fix=error.fix) from None
    total = total.reshape(grid)
    if site.channels_first:
        total = total.movedim(-1, 1)
    return replaced(output, lambda _: total, site.part)


def delta_at(y: Tensor, tuner: Tuner, call: Call, site: Site) -> Tensor:
    """What a tuner adds to a stream of tokens that it does not need to know."""
    nothing = torch.zeros_like(y)
    return added_at(nothing, tuner, call, replace(site, via=(), part=None))


def replaced(output: Any, change: Callable[[Tensor], Tensor], part: int | None = None) -> Any:
    """The same output with one of its tensors changed, the first by default."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, (tuple, list)):
        place = (
            next(i for i, t in enumerate(output) if isinstance(t, Tensor)) if part is None else part
        )
        changed = [*output]
        changed[place] = change(changed[place])
        return changed if isinstance(output, list) else tuple(changed)
    name = next(k for k, v in output.items() if isinstance(v, Tensor))
    output[name] = change(output[name])
    return output
