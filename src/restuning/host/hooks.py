"""What the hooks on a backbone do, where tuners are added and taps are kept.

One forward of a backbone with one block, and the hooks where they fire. `x` is the stream; a tuner
in use at a site gives a delta. `attach.py` says which modules get which hook; `host.py` registers.

```
model(images, timestep, attention_mask):
    # RecordTimestep            the time step is written down          (diffusion models)
    # RecordMask                which tokens are real is written down  (texts)
    x = embed(images)

    block(x):
        # SaveStream            x is saved for the block's tuner; before the first block it is the
        #                       tap block.0, and a stem's tuner is added to it
        # SaveStream            x is saved for the attention's tuner   (on the norm, which reads x)
        y = norm(x)
        # RecordAttentionInputs mask, positions and cache are written down
        y = attention(y)
        # RecordPositionBias    so is the bias that it returns         (T5)
        # AddDelta              y = y + tuner(saved x): the sum below adds both to the stream
        x = x + y

        y = feed_forward(norm(x))     # SaveStream and AddDelta, as for the attention
        x = x + y
    # AddDelta                  x = x + tuner(saved x) of the block; x is kept as the tap block.1.
    #                           After the last block a bypass in use puts its own state in place of x

    x = head(norm(x))
# GatherOutputs                 answers of several last streams come together  (side by side)
```

Where a gate that is no module stands between an operation and its sum (`x = x + gate * y`, adaLN),
adding to y would scale the delta by the gate. There the delta goes round it:

```
        y = attention(norm(x))        # AddBeforeGate      a tuner that reads y is added to it as usual
        x = x + gate * y
        # AddDeltaToReaders     every later module of the block that reads x reads x + delta
        x = x + gate * feed_forward(norm(x))
    # AddDelta                  the block returns x without the delta, which is added once more here
```

At a linear site one hook is enough, for it is shown what the map has read:

```
        y = W x                       # AddToMap            y = y + tuner(x), or to a part of its channels
```

A hook holds only plain data (its slot and its sites), so that a backbone with hooks can be compiled,
copied and pickled. What changes from call to call is in the `Call` of the calling thread; a hook that
finds none returns what it was given.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from restuning._errors import PlacementError, RecomputedError, TunerShapeError
from restuning._torch import is_in_backward
from restuning.host.call import Call, current_call, trained_slots
from restuning.host.side_by_side import SideBySide
from restuning.runtime.precision import HALF_PRECISION
from restuning.sites import Features, LinearSite, Site, first_tensor, take_stream
from restuning.tuners import Tuner, at_time, in_own_precision, real_tokens


@dataclass(frozen=True)
class GatherOutputs:
    """Combines the model's answers to several last streams, where it returns."""

    after: ClassVar[bool] = True
    slot: str

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """A forward hook."""
        call: Call | None = current_call(self.slot)
        if call is None or not isinstance(call.side, SideBySide):
            return output
        return change_tensor(output, call.side.gather)


@dataclass(frozen=True)
class SaveStream:
    """Saves the stream that a module reads, for the tuners of the sites that it enters.

    At a stem it also keeps the embedding output as a tap, and adds what a tuner there gives.

    Args:
        slot: The host's, under which this thread keeps the record of its call.
        sites: Whose stream this module is the first to read.
        stem: The tap of what enters here, `block.0` or `start.l`; "" elsewhere.
        first: The block that a stem enters.
    """

    after: ClassVar[bool] = False
    slot: str
    sites: tuple[Site, ...]
    stem: str = ""
    first: Site | None = None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """A forward pre-hook."""
        call: Call | None = current_call(self.slot)
        if call is None:
            return None
        x = _read_stream(args, kwargs)
        if x is None:
            return None
        changed = False
        if self.stem:
            call.rows = x.shape[0]
            # Before the stream is saved below: a tuner in the first block reads this sum.
            if self.stem in call.tuners:
                tuner = call.tuners[self.stem]
                call.reached.add(self.stem)
                wide = in_own_precision(tuner, x)
                delta = tuner(wide)
                if tuner.appends:
                    call.appended = tuner.appends
                    # Where the precisions are one, or autocast's, what it was.
                    delta = delta if wide is x else delta.to(x.dtype)
                    delta = torch.cat([x, delta], 1)
                else:
                    delta = (wide + delta).to(x.dtype) if wide is not x else x + delta
                x, changed = delta, True
            if self.stem in call.wanted:
                assert self.first is not None
                call.keep(self.stem, x, self.first.enters_channels_first(x))
        for site in self.sites:
            if site.name in call.tuners:
                call.streams[site.name] = x
        return _replace_stream(args, kwargs, x) if changed else None


@dataclass(frozen=True)
class AddDeltaToReaders:
    """Adds a tuner's delta to the stream that a module of a gated block reads.

    The delta is computed before the first such module, right after the sum, and is used again for
    the others and at the block's end.
    """

    after: ClassVar[bool] = False
    slot: str
    sites: tuple[Site, ...]

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """A forward pre-hook; it runs before the module's own `SaveStream`."""
        call: Call | None = current_call(self.slot)
        if call is None:
            return None
        for site in self.sites:
            tuner = call.tuners.get(site.name)
            if tuner is None or tuner.reads == "output":
                continue
            x = _read_stream(args, kwargs)
            assert x is not None
            # All later readers of a gated block read one and the same delta.
            if site.name not in call.deltas:
                call.deltas[site.name] = compute_delta(x, tuner, call, site)
            args, kwargs = _replace_stream(args, kwargs, x + call.deltas[site.name])
        return args, kwargs


def _read_stream(args: tuple, kwargs: dict) -> Tensor | None:
    """The stream among a module's inputs: the first tensor, or what transformers and diffusers name so."""
    return first_tensor(args) if args else kwargs.get("hidden_states", first_tensor(kwargs))


def _replace_stream(args: tuple, kwargs: dict, x: Tensor) -> tuple[tuple, dict]:
    """A module's inputs with another stream."""
    if args:
        return (x, *args[1:]), kwargs
    # Blocks of transformers and diffusers may be called by keyword alone.
    name = next(k for k, v in kwargs.items() if isinstance(v, Tensor))
    return args, {**kwargs, ("hidden_states" if "hidden_states" in kwargs else name): x}


@dataclass(frozen=True)
class AddBeforeGate:
    """Adds a tuner that reads an operation's output to that output, before the gate."""

    after: ClassVar[bool] = True
    slot: str
    sites: tuple[Site, ...]

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """A forward hook."""
        call: Call | None = current_call(self.slot)
        if call is None:
            return output
        for site in self.sites:
            tuner = call.tuners.get(site.name)
            if tuner is not None and tuner.reads == "output":
                call.streams.pop(site.name, None)
                y = first_tensor(output)
                assert y is not None
                wide = in_own_precision(tuner, y)
                total = tuner.added(wide, wide)
                total = total if wide is y else total.to(y.dtype)
                output = change_tensor(output, lambda _: total)  # noqa: B023
                call.reached.add(site.name)
        return output


@dataclass(frozen=True)
class AddDelta:
    """Adds a tuner's delta to the output that is added to the stream; keeps the taps of blocks."""

    after: ClassVar[bool] = True
    slot: str
    sites: tuple[Site, ...]

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """A forward hook."""
        call: Call | None = current_call(self.slot)
        if call is None:
            _refuse_recomputation(self.slot, self.sites[0].leave)
            return output
        for site in self.sites:
            if site.calls > 1:
                # One module may serve several sums of a block: only the call that counts is changed.
                count = call.counts.get(site.name, 0)
                call.counts[site.name] = count + 1
                # Modulo: under `host.using` one record goes through many forwards.
                if count % site.calls != site.nth:
                    continue
            if site.name in call.tuners and not (
                site.gated and call.tuners[site.name].reads == "output"
            ):
                tuner = call.tuners[site.name]
                output = add_delta(output, tuner, call, site)
                call.reached.add(site.name)
            if site.op in ("block", "stage"):
                names = (site.name, "last") if site.name == call.last else (site.name,)
                for tap in names:
                    if tap in call.wanted:
                        stream = take_stream(output, site.part)
                        assert stream is not None
                        call.keep(tap, stream, site.channels_first)
                # What a model does after its last block knows nothing of appended tokens.
                if site.name == call.last and call.appended:
                    output = change_tensor(output, lambda t: t[:, : -call.appended], site.part)  # noqa: B023
                    call.appended = 0
                if site.name == call.last and call.side is not None:
                    mask = call.mask(call.taps[site.name])
                    state = call.side(Features(call.taps, _no_readout, mask, call.time))
                    state = state.movedim(-1, 1) if site.channels_first else state
                    stream = take_stream(output, site.part)
                    # What the backbone does next, it does in its own precision.
                    if stream is not None and stream.dtype in HALF_PRECISION:
                        state = state.to(stream.dtype)
                    output = change_tensor(output, lambda _: state, site.part)  # noqa: B023
        return output


def _no_readout(*_: Any, **__: Any) -> Tensor:
    raise AssertionError("a bypass inside a forward makes a state, and the backbone reads it out")


def _refuse_recomputation(slot: str, where: str) -> None:
    # Without a record a block would be recomputed without its tuners, and gradients would be wrong
    # without a word. Only a host that has trained tuners can meet this.
    if torch.compiler.is_compiling() or slot not in trained_slots:
        return
    if is_in_backward():
        raise RecomputedError(
            "a block was run again inside backward, without its task",
            where=where,
            found="activation checkpointing that was switched on outside the host",
            fix="switch it off and call host.checkpoint(), which keeps the tuners; "
            "or host.release() if no task is trained any more",
        )


@dataclass(frozen=True)
class AddToMap:
    """Adds tuners to what a linear map or a convolution returns; they read what it has read.

    Args:
        slot: The host's.
        sites: Of this map: itself, and parts of its channels.
    """

    after: ClassVar[bool] = True
    slot: str
    sites: tuple[LinearSite, ...]

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """A forward hook."""
        call: Call | None = current_call(self.slot)
        if call is None:
            _refuse_recomputation(self.slot, self.sites[0].module)
            return output
        for site in self.sites:
            tuner = call.tuners.get(site.name)
            if tuner is not None:
                if not args:
                    raise _no_input(site)
                output = add_to_map(output, args[0], tuner, call, site)
                call.reached.add(site.name)
        return output


def add_to_map(y: Tensor, x: Tensor, tuner: Tuner, call: Call, site: LinearSite) -> Tensor:
    """What a map returned, with the tuner's delta added to the channels of its site."""
    if tuner.tells_rows and not (site.per_row and call.rows in (0, y.shape[0])):
        raise _rows_unknown(site.name, site.module, y.shape[0], call.rows)
    channels = slice(site.start, site.start + site.dim)
    whole, y = y, y[..., channels] if site.part else y
    kind = y.dtype
    x = y if tuner.reads == "output" else x
    x, y = in_own_precision(tuner, x), in_own_precision(tuner, y)
    if site.kind == "conv":
        x, y = x.movedim(1, -1), y.movedim(1, -1)
    with (
        real_tokens(call.mask(x, appended=True) if tuner.mixes_tokens else None),
        at_time(call.time) if call.time is not None else nullcontext(),
    ):
        total = tuner.added(y, x)
    total = (total.movedim(-1, 1) if site.kind == "conv" else total).to(kind)
    if not site.part:
        return total
    return torch.cat([whole[..., : channels.start], total, whole[..., channels.stop :]], -1)


def _no_input(site: LinearSite) -> PlacementError:
    return PlacementError(
        "a map with a tuner was given its input by keyword, where no hook sees it",
        where=f"{site.name} ({site.module})",
        found="a call without positional arguments; when sites were found its calls had them",
        fix="leave this site out, or let the backbone call the map with its input in the first place",
    )


def _rows_unknown(name: str, module: str, rows: int, inputs: int) -> PlacementError:
    return PlacementError(
        "rows of a batch cannot be told apart at a site",
        where=f"{name} ({module})",
        found=f"{rows} rows of {inputs} inputs: windows or patches of an input",
        fix="use one task at a time: host.using(task)",
    )


def add_delta(output: Any, tuner: Tuner, call: Call, site: Site) -> Any:
    """The output of a leave module with the tuner's delta added to its stream."""
    y = take_stream(output, site.part)
    assert y is not None
    if tuner.tells_rows and call.rows not in (0, y.shape[0]):
        raise _rows_unknown(site.name, site.leave, y.shape[0], call.rows)
    if site.via:
        delta = call.deltas.pop(site.name)
        return change_tensor(output, lambda y: y + delta, site.part)
    # Popped: a stream that stayed here would outlive its block.
    stream = call.streams.pop(site.name)
    x = y if tuner.reads == "output" or site.changes else stream
    kind = y.dtype
    x, y = in_own_precision(tuner, x), in_own_precision(tuner, y)
    narrow = y.dtype != kind
    if site.channels_first:
        x, y = x.movedim(1, -1), y.movedim(1, -1)
    grid = y.shape
    # Most tuners work token by token and know no grid.
    if y.dim() > 3 and not tuner.needs_grid:
        x, y = x.flatten(1, -2), y.flatten(1, -2)
    view = call.projections.get(site.name) if tuner.needs_view else None
    if view is not None and view.projections.module in call.attention:
        view = view.with_inputs(call.attention[view.projections.module])
    try:
        # Only tuners that mix tokens must know of padding, and only diffusion models have time.
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
    # Summed in fp32 and rounded once.
    total = total.to(kind) if narrow else total
    return change_tensor(output, lambda _: total, site.part)


def compute_delta(y: Tensor, tuner: Tuner, call: Call, site: Site) -> Tensor:
    """What a tuner adds to a stream, alone: the delta added to zeros of the stream's shape."""
    # Without `via`, which would look for the very delta that is made here.
    zeros = torch.zeros_like(y)
    return add_delta(zeros, tuner, call, replace(site, via=(), part=None))


def change_tensor(output: Any, change: Callable[[Tensor], Tensor], part: int | None = None) -> Any:
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
    # In place: a ModelOutput of transformers is a dict whose keys are attributes as well.
    output[name] = change(output[name])
    return output
