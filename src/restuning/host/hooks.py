"""What the hooks do with the record of a call. Registers nothing: `host.py` does.

A hook holds only plain data (its slot and its sites). What changes from call to call travels in the
`Call` of the calling thread (`record.py`); a hook that finds none returns what it was given.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from restuning._errors import RecomputedError, TunerShapeError
from restuning._torch import is_in_backward
from restuning.host.call import Call, current, trained
from restuning.host.side_by_side import SideBySide
from restuning.sites import Features, Site, first_tensor, stream_in
from restuning.tuners import Tuner, at_time, real_tokens


@dataclass(frozen=True)
class GatherOutputs:
    """Brings together what came of several last streams, where the model returns."""

    after: ClassVar[bool] = True
    slot: str

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """A forward hook."""
        call: Call | None = current(self.slot)
        if call is None or not isinstance(call.side, SideBySide):
            return output
        return replaced(output, call.side.gather)


@dataclass(frozen=True)
class SaveStream:
    """Notes the stream that enters a site; at a stem keeps its tap and adds tokens.

    `first` is the block that a stem enters.
    """

    after: ClassVar[bool] = False
    slot: str
    sites: tuple[Site, ...]
    stem: str = ""
    first: Site | None = None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """A forward pre-hook."""
        call: Call | None = current(self.slot)
        if call is None:
            return None
        x = first_tensor(args) if args else kwargs.get("hidden_states", first_tensor(kwargs))
        if x is None:
            return None
        changed = False
        if self.stem:
            if self.stem in call.tuners:
                tuner = call.tuners[self.stem]
                call.reached.add(self.stem)
                delta = tuner(x)
                if tuner.appends:
                    call.appended = tuner.appends
                    delta = torch.cat([x, delta], 1)
                else:
                    delta = x + delta
                x, changed = delta, True
            if self.stem in call.needs.taps:
                assert self.first is not None
                call.keep(self.stem, x, self.first.enters_channels_first(x))
        for site in self.sites:
            if site.name in call.tuners:
                call.entered[site.name] = x
        if not changed:
            return None
        if args:
            return (x, *args[1:]), kwargs
        name = next(k for k, v in kwargs.items() if isinstance(v, Tensor))
        return args, {**kwargs, ("hidden_states" if "hidden_states" in kwargs else name): x}


@dataclass(frozen=True)
class AddDeltaToReaders:
    """Adds a tuner's delta to the stream that a module of a gated block reads.

    The delta is worked out at the first such module, where the sum was made, and carried to the
    others and to the block's end.
    """

    after: ClassVar[bool] = False
    slot: str
    sites: tuple[Site, ...]

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """A forward pre-hook; it runs before the module's own `SaveStream`."""
        call: Call | None = current(self.slot)
        if call is None:
            return None
        for site in self.sites:
            tuner = call.tuners.get(site.name)
            if tuner is None or tuner.reads == "output":
                continue
            x = first_tensor(args) if args else kwargs["hidden_states"]
            assert x is not None
            if site.name not in call.carried:
                call.carried[site.name] = delta_at(x, tuner, call, site)
            x = x + call.carried[site.name]
            if args:
                args = (x, *args[1:])
            else:
                kwargs = {**kwargs, "hidden_states": x}
        return args, kwargs


@dataclass(frozen=True)
class AddBeforeGate:
    """Adds what a tuner makes of OP's own output, before the gate that follows OP."""

    after: ClassVar[bool] = True
    slot: str
    sites: tuple[Site, ...]

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """A forward hook."""
        call: Call | None = current(self.slot)
        if call is None:
            return output
        for site in self.sites:
            tuner = call.tuners.get(site.name)
            if tuner is not None and tuner.reads == "output":
                call.entered.pop(site.name, None)
                y = first_tensor(output)
                assert y is not None
                total = tuner.added(y, y)
                output = replaced(output, lambda _: total)  # noqa: B023
                call.reached.add(site.name)
        return output


@dataclass(frozen=True)
class AddDelta:
    """Adds the tuner's delta where the operation's output meets the stream, and keeps taps."""

    after: ClassVar[bool] = True
    slot: str
    sites: tuple[Site, ...]

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """A forward hook."""
        call: Call | None = current(self.slot)
        if call is None:
            _refuse_recomputation(self)
            return output
        for site in self.sites:
            if site.calls > 1:
                count = call.counts.get(site.name, 0)
                call.counts[site.name] = count + 1
                if count % site.calls != site.nth:
                    continue
            if site.name in call.tuners and not (
                site.gated and call.tuners[site.name].reads == "output"
            ):
                tuner = call.tuners[site.name]
                output = added_at(output, tuner, call, site)
                call.reached.add(site.name)
            if site.op in ("block", "stage"):
                names = (site.name, "last") if site.name == call.last else (site.name,)
                for tap in names:
                    if tap in call.needs.taps:
                        kept = stream_in(output, site.part)
                        assert kept is not None
                        call.keep(tap, kept, site.channels_first)
                if site.name == call.last and call.appended:
                    output = replaced(output, lambda t: t[:, : -call.appended], site.part)  # noqa: B023
                    call.appended = 0
                if site.name == call.last and call.side is not None:
                    mask = call.mask(call.kept[site.name])
                    state = call.side(Features(call.kept, _no_readout, mask, call.time))
                    state = state.movedim(-1, 1) if site.channels_first else state
                    output = replaced(output, lambda _: state, site.part)  # noqa: B023
        return output


def _no_readout(*_: Any, **__: Any) -> Tensor:
    raise AssertionError("a bypass inside a forward makes a state, and the backbone reads it out")


def _refuse_recomputation(hook: AddDelta) -> None:
    if torch.compiler.is_compiling() or hook.slot not in trained:
        return
    if is_in_backward():
        raise RecomputedError(
            "a block was run again inside backward, without its task",
            where=hook.sites[0].leave,
            found="activation checkpointing that was switched on outside the host",
            fix="switch it off and call host.checkpoint(), which keeps the tuners; "
            "or host.release() if no task is trained any more",
        )


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
