"""What the hooks do with the record of a call. Registers nothing: `host.py` does.

A hook holds only plain data (its slot and its sites). What changes from call to call travels in the
`Call` of the calling thread (`record.py`); a hook that finds none returns what it was given.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from restuning._errors import MapsError, RecomputedError, TunerShapeError
from restuning.bypass import Features
from restuning.record import Call, current, trained
from restuning.sites import Site, first_tensor, given, has_past, returned_bias
from restuning.tuners import Tuner, real_tokens


def around(path: str) -> list[str]:
    """The modules around a path, the model ("") first."""
    names = path.split(".")
    return [".".join(names[:i]) for i in range(len(names))]


def place_of_mask(module: nn.Module) -> int | None:
    """Where a module's forward takes `attention_mask`; None where it does not."""
    names = list(inspect.signature(module.forward).parameters)
    return names.index("attention_mask") if "attention_mask" in names else None


@dataclass(frozen=True)
class Padding:
    """Notes which tokens are real, where a model or one of its stacks is told.

    A stack's own mask comes after the model's and counts for its layers; one that is given in
    another form (BERT's encoder gets a mask of scores) leaves the model's as it is.
    """

    slot: str
    place: int
    outermost: bool

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A forward pre-hook."""
        call: Call | None = current(self.slot)
        if call is None:
            return
        given = self.place < len(args) or "attention_mask" in kwargs
        mask = args[self.place] if self.place < len(args) else kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            call.real = mask.bool()
        elif mask is None and (given or self.outermost):
            call.real = None
        if call.looks_ahead:
            call.cache = kwargs.get("cache", kwargs.get("past_key_values"))
            if has_past(call.cache):
                raise MapsError(
                    "a tuner that looks at all tokens cannot decode with a cache",
                    found="one token at a time is shown to it (a gate averages over tokens)",
                    fix="generate(..., use_cache=False), or tuners that work token by token",
                )


@dataclass(frozen=True)
class Enter:
    """Notes the stream that enters a site; at a stem keeps its tap and adds tokens.

    `first` is the block that a stem enters.
    """

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
class Beside:
    """Notes what an attention is given beside the stream, for tuners that repeat its softmax."""

    slot: str
    path: str
    relative: bool

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """A forward pre-hook."""
        call: Call | None = current(self.slot)
        if call is None or not call.lends:
            return None
        call.given[self.path] = given(module, args, kwargs)
        if call.appended and (self.relative or call.given[self.path].rope is not None):
            raise MapsError(
                "tokens appended at the stem have no place among relative positions",
                where=self.path,
                fix="use the method vpt-deep or prefix",
            )
        if not call.appended or call.given[self.path].mask is None:
            return None
        tokens = (first_tensor(args) if args else first_tensor(kwargs)).shape[1]  # type: ignore[union-attr]

        def longer(value: Any) -> Any:
            return _seen_too(value, tokens) if _is_mask(value) else value

        return tuple(map(longer, args)), {k: longer(v) for k, v in kwargs.items()}


def _is_mask(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4 and value.shape[1] == 1


def _seen_too(mask: Tensor, tokens: int) -> Tensor:
    """A mask in which appended tokens are seen, and see what the token before them sees."""
    more = tokens - mask.shape[-1]
    if more <= 0:
        return mask
    seen = mask.new_ones(()) if mask.dtype == torch.bool else mask.new_zeros(())
    mask = torch.cat([mask, seen.expand(*mask.shape[:-1], more)], -1)
    if mask.shape[-2] == 1:
        return mask
    return torch.cat([mask, mask[..., -1:, :].expand(*mask.shape[:2], more, -1)], -2)


@dataclass(frozen=True)
class Bias:
    """Notes the relative-position bias that an attention returns beside its output (T5)."""

    slot: str
    path: str

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        """A forward hook."""
        call: Call | None = current(self.slot)
        if call is not None and self.path in call.given:
            call.given[self.path] = call.given[self.path]._replace(bias=returned_bias(output))


@dataclass(frozen=True)
class Leave:
    """Adds the tuner's delta where the operation's output meets the stream, and keeps taps."""

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
                        call.keep(tap, kept, site.channels_first)
                if site.name == call.last and call.appended:
                    output = _replaced(output, lambda t: t[:, : -call.appended])  # noqa: B023
                    call.appended = 0
                if site.name == call.last and call.bypass is not None:
                    mask = call.mask(call.kept[site.name])
                    state = call.bypass(Features(call.kept, _no_readout, mask))
                    state = state.movedim(-1, 1) if site.channels_first else state
                    output = _replaced(output, lambda _: state)  # noqa: B023
        return output


def _no_readout(*_: Any, **__: Any) -> Tensor:
    raise AssertionError("a bypass inside a forward makes a state, and the backbone reads it out")


def _refuse_recomputation(hook: Leave) -> None:
    if torch.compiler.is_compiling() or hook.slot not in trained:
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
        with real_tokens(call.mask(x, appended=True)) if tuner.mixes_tokens else nullcontext():
            total = tuner.added(y, x, view)
    except TunerShapeError as error:
        where = f"{error.where} at {site.name}"
        raise TunerShapeError(error.what, where=where, found=error.found, fix=error.fix) from None
    total = total.reshape(grid)
    if site.channels_first:
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
