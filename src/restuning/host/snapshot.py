"""What a backbone was when a host was built on it, so that a change under a live host is noticed.

Three checks, each dearer than the one before. Every forward compares which tensors and modules stand
where, how often each tensor was written to, and which adapters are in use: no number is read. Where
that has changed, sums of the bytes of what changed are compared, so that what only moved (to another
device, into a checkpoint) or was written with the same values passes. All sums are compared before
anything is named by the backbone's digest: a training, a store, a task file.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from itertools import chain
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from restuning._errors import BackboneChangedError
from restuning._torch import (
    counts_versions,
    has_values,
    is_sharded,
    local_part,
    own_registers,
    sharded_modules,
    version_of,
)
from restuning.host.weights import (
    Contents,
    Weight,
    adapter_state,
    hooks_of_accelerate,
    is_adapted,
    list_contents,
    reshard,
)

NAMED = 4
"""How many changed names an error tells."""


class Snapshot:
    """The state of a backbone, taken by `take`; a copy of a host begins without one.

    Args:
        model: The backbone.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._known: _Known | None = None
        self._sums: dict[str, tuple[int, ...]] = {}
        # Of which the sum is over the part that this process holds.
        self._partly: set[str] = set()
        self._taken: dict[str, Tensor] = {}
        self._made: dict[str, Any] = {}
        self._lock = Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is of another model, and takes a state of its own when it is first asked."""
        return type(self), (self.model,)

    def take(self) -> None:
        """Remember the backbone as it is now.

        Cost: 0.2 s a gigabyte on a CPU.
        """
        reshard(self.model)
        contents = list_contents(self.model)
        self._sums = _sums(contents.weights)
        self._partly = {weight.name for weight in contents.weights if is_sharded(weight.kept)}
        self._taken = {weight.name: weight.kept for weight in contents.weights}
        self._known = _Known(self.model, contents)

    def check(self) -> None:
        """Compare what stands where; the cheap check, for every forward.

        Raises:
            BackboneChangedError: Weights were written to, modules replaced or adapters switched.

        Cost: 0.3 ms for a ViT-B.
        """
        if self._known is None or torch.compiler.is_compiling() or self._known.holds():
            return
        # Two threads may come here at once, and one of them finds all well again.
        with self._lock:
            if not self._known.holds():
                self._compare(everything=False, trained=False)

    def check_values(self, *, trained: bool = True) -> None:
        """Compare sums of all bytes as well: what was written behind torch's back (`p.data.add_`) is seen.

        Args:
            trained: Also of parameters that ask for gradients again: whoever let them do so trains them
                inside the backbone, and may run it, but not call it what it was.

        Raises:
            BackboneChangedError: As `check`.

        Cost: 0.2 s a gigabyte on a CPU.
        """
        if self._known is None:
            self.take()
            return
        with self._lock:
            self._compare(everything=True, trained=trained)

    def remember(self, **makes: Callable[[nn.Module], Any]) -> dict[str, Any]:
        """What follows from the backbone's values, each worked out once while they are what they were.

        Args:
            makes: What works it out, by name; a name always means the same.

        Raises:
            BackboneChangedError: They are not.

        Cost: that of `check_values`, once for all names.
        """
        self.check_values()
        weights = self._known.contents.weights if self._known is not None else ()
        # Without values here (offloaded) there is no sum that would tell.
        whole = all(w.name in self._sums for w in weights if w.kind != "made")
        for name, make in makes.items():
            if name not in self._made or not whole:
                made = make(self.model)
                if self._made.setdefault(name, made) != made:
                    raise _changed(self.model, [f"another {name}"])
        return {name: self._made[name] for name in makes}

    def _was_there(self, weight: Weight) -> bool:
        return self._taken.get(weight.name) is weight.kept

    def _compare(self, *, everything: bool, trained: bool) -> None:
        known = self._known
        assert known is not None
        reshard(self.model)
        then, now = known.contents, list_contents(self.model)
        lines = []
        if moved := _different(then.modules, now.modules):
            lines.append(f"other modules: {_few(moved)}")
        if switched := _different(then.adapters, now.adapters):
            lines.append(f"other adapters in use: {_few(switched)}")
        before = {w.name: w for w in then.weights if w.kind != "made"}
        weights = {w.name: w for w in now.weights if w.kind != "made"}
        asked = [w for w in weights.values() if everything or not known.is_same(w)]
        if not trained:
            # Those that were there; what was put in their place is another weight.
            asked = [w for w in asked if not (w.kept.requires_grad and self._was_there(w))]
        # Shared out since: compared whole once, for which all processes come here in their next forward.
        parted = {w.name: w for w in asked if is_sharded(w.kept) and w.name not in self._partly}
        sums = _sums(asked, whole=parted)
        written = [n for n, total in sums.items() if self._sums.get(n, total) != total]
        if written := sorted({*written, *(before.keys() ^ weights.keys())}):
            lines.append(f"other values: {_few(written)}")
        if lines:
            raise _changed(self.model, lines)
        self._sums |= _sums(parted.values())
        self._partly |= parted.keys()
        self._taken |= {name: weight.kept for name, weight in parted.items()}
        self._known = _Known(self.model, now)


class _Known:
    """What every forward compares, as flat lists.

    Buffers that a model makes by itself are left out: some are made again for longer inputs.
    """

    def __init__(self, model: nn.Module, contents: Contents) -> None:
        self.contents = contents
        modules = list(model.modules())
        self._registers: list[dict[str, Any]] = []
        sharded = bool(sharded_modules(model))
        for module in modules:
            parameters, buffers, children = own_registers(module)
            self._registers.append(children)
            # What Accelerate brings for a forward, and FSDP puts together, is a new object each time.
            if not sharded and not hooks_of_accelerate(module):
                self._registers += [parameters, buffers]
        self._registers = [each for each in self._registers if each]
        made = {id(w.kept) for w in contents.weights if w.kind == "made"}
        self._tensors = [
            t
            for t in (*model.parameters(), *model.buffers())
            if id(t) not in made and counts_versions(t) and not sharded and not t.requires_grad
        ]
        self._versions = {id(t): version_of(t) for t in self._tensors}
        self._adapted = [m for m in modules if is_adapted(m)]
        # Held, so that none of their numbers is given to another object.
        self._held = [*chain.from_iterable(each.values() for each in self._registers)]
        self._state = self._read()

    def holds(self) -> bool:
        """Whether nothing has moved, and nothing was written to."""
        return self._read() == self._state

    def is_same(self, weight: Weight) -> bool:
        """Whether a tensor was there before, and was not written to since."""
        known = self._versions.get(id(weight.kept))
        return known is not None and known == version_of(weight.kept)

    def _read(self) -> tuple[list[int], list[int], list[Any]]:
        return (
            list(map(id, chain.from_iterable(map(_values, self._registers)))),
            list(map(version_of, self._tensors)),
            list(map(adapter_state, self._adapted)),
        )


_values = dict.values


def _changed(model: nn.Module, lines: list[str]) -> BackboneChangedError:
    return BackboneChangedError(
        "the backbone is not what it was when its host was built",
        where=type(model).__name__,
        found="; ".join(lines),
        fix="make it again what it was; or host.release() and build a Host for what it is now, "
        "which is another backbone to tasks and stores of before",
    )


def _different(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names under which the two have different objects, without what stands inside of such."""
    names = {n for n in {**then, **now} if then.get(n) is not now.get(n)}
    if all(isinstance(value, str) for value in (*then.values(), *now.values())):
        names = {n for n in {**then, **now} if then.get(n) != now.get(n)}
    inside = tuple(f"{name}." for name in names if name)
    return sorted(n for n in names if not n.startswith(inside))


def _few(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(name or 'the model' for name in names[:NAMED])}{more}"


COLUMNS = 4093
"""Eight-byte words in a row of a sum; a prime, so that exchanged rows of a matrix are seen."""

PIECE = {"cpu": 16}
"""Rows that are summed at once: on a CPU as many as its cache holds, elsewhere `LARGE_PIECE`."""

LARGE_PIECE = 2048
"""64 MB."""


def _sums(weights: Iterable[Weight], whole: Container[str] = ()) -> dict[str, tuple[int, ...]]:
    """Sums over the bytes of each tensor that has any here; of a sharded one over this process's.

    Args:
        weights: Which.
        whole: Names of those that are put together for it, one at a time.
    """
    sums: dict[str, list[Tensor]] = {}
    for weight in weights:
        if not has_values(weight.kept) or weight.kind == "made":
            continue
        if is_sharded(weight.kept) and weight.name not in whole:
            parts = [local_part(weight.kept)]
        else:
            parts = [part for _, part in weight.parts()]
        if all(map(has_values, parts)):
            sums[weight.name] = [_sum(part) for part in parts]
    # One transfer a device, not one a tensor.
    flat = [each for parts in sums.values() for each in parts]
    numbers: dict[int, int] = {}
    for device in {each.device for each in flat}:
        here = [each for each in flat if each.device == device]
        totals = torch.stack(here).tolist()
        numbers |= {id(each): total for each, total in zip(here, totals, strict=True)}
    return {name: tuple(numbers[id(each)] for each in parts) for name, parts in sums.items()}


def _sum(tensor: Tensor) -> Tensor:
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if raw.storage_offset() % 8:
        raw = raw.clone()
    whole = len(raw) // 8 * 8
    words = raw[:whole].view(torch.int64)
    rows = len(words) // COLUMNS * COLUMNS
    rest = words[rows:]
    columns = _sum_columns(words[:rows].view(-1, COLUMNS)) if rows else ()
    # A sum in which the place counts, by odd numbers: even ones would shift high bits out.
    numbers = torch.cat([rest, rest >> 32, raw[whole:].long(), *columns])
    # Of a sharded tensor a process may have nothing.
    return (numbers * (2 * torch.arange(len(numbers), device=raw.device) + 1)).sum()


def _sum_columns(words: Tensor) -> Tensor:
    """Sums over the rows, of the words and of their upper halves alone.

    Overflows wrap around, and lose a word's highest bit where it changes twice: the sign of every second
    number in fp32.
    """
    sums = words.new_zeros(2, words.shape[1])
    for piece in words.split(PIECE.get(words.device.type, LARGE_PIECE)):
        sums[0] += piece.sum(0)
        sums[1] += (piece >> 32).sum(0)
    return sums
