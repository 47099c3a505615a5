"""What the hooks do with the record of a call. Registers nothing: `host.py` does.

A hook holds only plain data (its slot and its sites). What changes from call to call travels in the
`Call` of the calling thread (`record.py`); a hook that finds none returns what it was given.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from restuning._errors import MapsError, RecomputedError
from restuning.adding import added_at, delta_at, replaced
from restuning.bypass import Features
from restuning.record import Call, current, trained
from restuning.sites import Site, first_tensor, has_past, stream_in
from restuning.spread import Spread


def around(path: str) -> list[str]:
    """The modules around a path, the model ("") first."""
    names = path.split(".")
    return [".".join(names[:i]) for i in range(len(names))]


def place_of(name: str, module: nn.Module) -> int | None:
    """Where a module's forward takes an argument of this name; None where it does not."""
    names = list(inspect.signature(module.forward).parameters)
    return names.index(name) if name in names else None


@dataclass(frozen=True)
class Clock:
    """Notes the time step that a diffusion model is given."""

    after: ClassVar[bool] = False
    slot: str
    place: int

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A forward pre-hook."""
        call: Call | None = current(self.slot)
        if call is None:
            return
        step = args[self.place] if self.place < len(args) else kwargs.get("timestep")
        call.time = None if step is None else torch.as_tensor(step, dtype=torch.float32).reshape(-1)


@dataclass(frozen=True)
class Gather:
    """Brings together what came of several last streams, where the model returns."""

    after: ClassVar[bool] = True
    slot: str

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """A forward hook."""
        call: Call | None = current(self.slot)
        if call is None or not isinstance(call.bypass, Spread):
            return output
        return replaced(output, call.bypass.gather)


@dataclass(frozen=True)
class Padding:
    """Notes which tokens are real, where a model or one of its stacks is told.

    A stack's own mask comes after the model's and counts for its layers; one that is given in
    another form (BERT's encoder gets a mask of scores) leaves the model's as it is.
    """

    after: ClassVar[bool] = False
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
class Via:
    """Adds a tuner's delta to the stream that a module of a gated block reads.

    The delta is worked out at the first such module, where the sum was made, and carried to the
    others and to the block's end.
    """

    after: ClassVar[bool] = False
    slot: str
    sites: tuple[Site, ...]

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """A forward pre-hook; it runs before the module's own `Enter`."""
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
class Inside:
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
class Leave:
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
                if site.name == call.last and call.bypass is not None:
                    mask = call.mask(call.kept[site.name])
                    state = call.bypass(Features(call.kept, _no_readout, mask, call.time))
                    state = state.movedim(-1, 1) if site.channels_first else state
                    output = replaced(output, lambda _: state, site.part)  # noqa: B023
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
