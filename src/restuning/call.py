"""The record of one call, and what the hooks do with it. Registers nothing: `host.py` does.

A hook holds only plain data (its slot and its sites). What changes from call to call travels in a
`Call` of the calling thread; a hook that finds none returns what it was given.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from restuning._errors import RecomputedError, TunerShapeError
from restuning.bypass import Needs
from restuning.sites import LentMaps, Site, first_tensor
from restuning.tuners import Tuner

_local = threading.local()
_trained: set[str] = set()
"""Slots of hosts that ran a task with gradients: only these can meet a recomputation."""


class Call:
    """The record of one call: what is in use, what was seen. Lives in one thread."""

    def __init__(
        self, tuners: Mapping[str, Tuner], needs: Needs, views: Mapping[int, LentMaps], last: str
    ) -> None:
        self.tuners, self.needs, self.views, self.last = tuners, needs, views, last
        self.entered: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}
        self.masks: dict[int, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.reached: set[str] = set()
        self.appended = 0

    def again(self) -> Call:
        """A fresh record of the same task, for a block that is recomputed."""
        return Call(self.tuners, Needs(()), self.views, self.last)

    def keep(self, tap: str, stream: Tensor) -> None:
        """Keep a tap, only the tokens that are needed."""
        if self.appended:
            stream = stream[:, : -self.appended]
        if self.needs.tokens == "cls":
            stream = stream[:, :1]
            # A slice would hold the whole stream in memory; a copy of one token lets it go.
            stream = stream if stream.requires_grad else stream.clone()
        self.kept[tap] = stream


@dataclass(frozen=True)
class Enter:
    """Notes the stream that enters a site; at the stem keeps tap 0 and adds tokens."""

    slot: str
    sites: tuple[Site, ...]
    stem: bool

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """A forward pre-hook."""
        call: Call | None = getattr(_local, self.slot, None)
        if call is None:
            return None
        x = first_tensor(args) if args else kwargs.get("hidden_states", first_tensor(kwargs))
        if x is None:
            return None
        changed = False
        if self.stem:
            if "block.0" in call.tuners:
                tuner = call.tuners["block.0"]
                call.reached.add("block.0")
                delta = tuner(x)
                if tuner.appends:
                    call.appended = tuner.appends
                    delta = torch.cat([x, delta], 1)
                else:
                    delta = x + delta
                x, changed = delta, True
            if "block.0" in call.needs.taps:
                call.keep("block.0", x)
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
class Mask:
    """Notes the mask an attention was given, for tuners that repeat its softmax."""

    slot: str
    layer: int

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A forward pre-hook."""
        call: Call | None = getattr(_local, self.slot, None)
        if call is not None and call.tuners:
            for value in (*args, *kwargs.values()):
                if isinstance(value, Tensor) and value.dim() == 4 and value.shape[1] == 1:
                    call.masks[self.layer] = value


@dataclass(frozen=True)
class Leave:
    """Adds the tuner's delta where the operation's output meets the stream, and keeps taps."""

    slot: str
    sites: tuple[Site, ...]

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """A forward hook."""
        call: Call | None = getattr(_local, self.slot, None)
        if call is None:
            _refuse_recomputation(self)
            return output
        for site in self.sites:
            if site.calls > 1:
                count = call.counts.get(site.name, 0)
                call.counts[site.name] = count + 1
                if count % site.calls != site.nth:
                    continue
            if site.name in call.tuners:
                tuner = call.tuners[site.name]
                output = _added(output, tuner, call, site)
                call.reached.add(site.name)
            if site.op == "block":
                names = (site.name, "last") if site.name == call.last else (site.name,)
                for tap in names:
                    if tap in call.needs.taps:
                        kept = first_tensor(output)
                        assert kept is not None
                        call.keep(tap, kept)
                if site.name == call.last and call.appended:
                    output = _replaced(output, lambda t: t[:, : -call.appended])  # noqa: B023
                    call.appended = 0
        return output


def _refuse_recomputation(hook: Leave) -> None:
    if torch.compiler.is_compiling() or hook.slot not in _trained:
        return
    if torch._C._current_graph_task_id() != -1:
        raise RecomputedError(
            "a block was run again inside backward, without its task",
            where=hook.sites[0].leave,
            found="activation checkpointing that was switched on outside the host",
            fix="switch it off and call host.checkpoint(), which keeps the tuners; "
            "or host.release() if no task is trained any more",
        )


def _added(output: Any, tuner: Tuner, call: Call, site: Site) -> Any:
    y = first_tensor(output)
    assert y is not None
    x = y if tuner.reads == "output" else call.entered.pop(site.name)
    if site.layout == "b d h w":
        x, y = x.movedim(1, -1), y.movedim(1, -1)
    view = call.views.get(site.layer) if tuner.needs_view else None
    if view is not None and site.layer in call.masks:
        view = view.masked(call.masks[site.layer])
    try:
        total = tuner.added(y, x, view)
    except TunerShapeError as error:
        where = f"{error.where} at {site.name}"
        raise TunerShapeError(error.what, where=where, found=error.found, fix=error.fix) from None
    if site.layout == "b d h w":
        total = total.movedim(-1, 1)
    return _replaced(output, lambda _: total)


def _replaced(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same output with its first tensor changed."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, tuple):
        return (change(output[0]), *output[1:])
    if isinstance(output, list):
        return [change(output[0]), *output[1:]]
    name = next(k for k, v in output.items() if isinstance(v, Tensor))
    output[name] = change(output[name])
    return output


@contextmanager
def in_use(slot: str, call: Call | None) -> Iterator[None]:
    """The hooks of a slot see this record in this thread, and what was there before afterwards."""
    before = getattr(_local, slot, None)
    with_gradient = call is not None and call.tuners and torch.is_grad_enabled()
    # A compiled graph needs no guard against recomputation, and must not carry this effect.
    if with_gradient and not torch.compiler.is_compiling():
        _trained.add(slot)
    setattr(_local, slot, call)
    try:
        yield
    finally:
        setattr(_local, slot, before)


def current(slot: str) -> Call | None:
    """The record in use in this thread."""
    return getattr(_local, slot, None)


def idle(slot: str) -> None:
    """Make a slot known to this thread: a first use after compilation would cost a second graph."""
    setattr(_local, slot, None)


def forget(slot: str) -> None:
    """A released host leaves nothing behind in this thread."""
    _trained.discard(slot)
    vars(_local).pop(slot, None)
