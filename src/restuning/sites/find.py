"""Structure proposes, one recorded forward proves: `next stream == stream + leave output`.

A block is an innermost member of a `ModuleList` or `Sequential` in which such a sum is seen. For
each sum the stream read, the operation and the *latest* module of the branch are kept, so that a
tuner is added at the residual sum: after LayerScale and drop-path, which differ per family.
The finder only listens; the forward and its hooks belong to `host.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from restuning._errors import NoSitesError
from restuning.sites.families import declared_sites
from restuning.sites.maps import Maps, propose, prove
from restuning.sites.readout import Readout, ReadoutListener
from restuning.sites.site import Layout, Op, Site, Sites

SUM_TOLERANCE = 1e-5
"""Largest error of a sum relative to the branch when it is not bit-equal (fused multiply-adds)."""

_ATTENTION = re.compile(r"attn|attention|xca|msa|mixer", re.I)
_FFN = re.compile(r"mlp|ffn|feed_?forward|intermediate|glu", re.I)
_NORM = re.compile(r"norm", re.I)
_CROSS = ("encoder_hidden_states", "key_value_states", "context")


@dataclass(eq=False, slots=True)
class _Call:
    path: str
    module: nn.Module
    start: int
    entered: Tensor | None
    cross: bool = False
    end: int = -1
    left: Tensor | None = None


@dataclass(eq=False, slots=True)
class _Open:
    """A candidate block whose forward is under way."""

    path: str
    stream: Tensor
    calls: list[_Call] = field(default_factory=list)
    outer: bool = False


def first_tensor(value: Any) -> Tensor | None:
    """The tensor itself, or the first of a tuple, list or model output."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (tuple, list)):
        return next((t for t in value if isinstance(t, Tensor)), None)
    if isinstance(value, dict):
        return next((t for t in value.values() if isinstance(t, Tensor)), None)
    return None


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers in the same memory order."""
    return a.numel() == b.numel() and torch.equal(a.reshape(-1), b.reshape(-1))


class Finder:
    """Listens to one forward (`enter`, `leave` of every module) and says where the sites are."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.readout = ReadoutListener(model)
        self.sites: list[Site] = []
        self.layer = 0
        self.clock = 0
        self.open: list[_Open] = []
        self.stack: list[_Call] = []
        self.candidates = {
            f"{path}.{name}" if path else name
            for path, container in model.named_modules()
            if isinstance(container, (nn.ModuleList, nn.Sequential))
            for name, child in container.named_children()
            if any(isinstance(m, nn.Linear) for m in child.modules())
            and next(child.children(), None) is not None
        }

    def enter(self, path: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """A module is about to run."""
        self.clock += 1
        x = first_tensor(args)
        if x is None:
            x = kwargs.get("hidden_states", first_tensor(kwargs))
        x = x.detach() if isinstance(x, Tensor) and x.is_floating_point() else None
        self._prove_chain(x)
        if all(block.outer for block in self.open):
            self.readout.enter(path, module, x)
        if path in self.candidates and x is not None and x.dim() >= 3:
            self.open.append(_Open(path, x.clone()))
        call = _Call(path, module, self.clock, None)
        call.cross = any(kwargs.get(name) is not None for name in _CROSS)
        # Clones, because a later in-place operation would change what was seen.
        if x is not None and any(o.stream.numel() == x.numel() for o in self.open):
            call.entered = x.clone()
        self.stack.append(call)

    def leave(self, path: str, output: Any) -> None:
        """A module has returned."""
        self.clock += 1
        call = self.stack.pop()
        call.end = self.clock
        y = first_tensor(output)
        y = y.detach() if y is not None and y.is_floating_point() else None
        if y is not None and any(o.stream.numel() == y.numel() for o in self.open):
            call.left = y.clone()
        for block in self.open:
            block.calls.append(call)
        if self.open and self.open[-1].path == path:
            block = self.open.pop()
            if not block.outer and self._analyse(block, call):
                for outer in self.open:
                    outer.outer = True
        if all(block.outer for block in self.open):
            self.readout.leave(path, y)

    def found(self, output: Any) -> tuple[Sites, Readout]:
        """All sites and the readout.

        Raises:
            NoSitesError: There are none.
        """
        if not self.sites:
            raise NoSitesError(
                "no place to tune was found",
                where=type(self.model).__name__,
                found=f"{len(self.candidates)} repeated blocks, none with an attention or MLP "
                "whose output is added to the stream",
                fix="give them yourself: Host(model, x, sites=Sites.declare([Site(...), ...]))",
            )
        causal = any(
            (s.maps is not None and s.maps.causal)
            or getattr(self.model.get_submodule(s.module), "is_causal", False) is True
            for s in self.sites
        )
        readout = self.readout.found(output, causal=causal)
        if self.sites[-1].op == "block" and readout.proof == "exact":
            self.sites[-1] = replace(self.sites[-1], proof="residual")
        return Sites(self.sites), readout

    def _prove_chain(self, x: Tensor | None) -> None:
        """The last block's output is a stream if the next module reads just that."""
        if x is None or not self.sites or self.readout.last is None:
            return
        site = self.sites[-1]
        if site.op == "block" and site.proof == "shape" and equal(x, self.readout.last):
            self.sites[-1] = replace(site, proof="residual")

    def _analyse(self, block: _Open, own: _Call) -> bool:
        stream = block.stream
        if own.left is None or own.left.numel() != stream.numel():
            return False
        calls = sorted((c for c in block.calls if c is not own), key=lambda c: c.end)
        sums = _sums([own, *calls], own)
        layer = self.layer + 1
        found: list[Site] = []
        maps: Maps | None = None
        since = 0
        for start, entered, branch in sums:
            inside = [c for c in calls if c.start >= max(start, since) and c.end <= branch.end]
            since = branch.end
            op, module = _operation(inside)
            if op is None or module is None or entered.entered is None:
                continue
            if op in {s.op for s in found}:
                continue
            if op == "mha":
                maps = self._maps(module, entered.entered, inside, calls, own)
            same = [c for c in sorted(calls, key=lambda c: c.start) if c.path == branch.path]
            found.append(
                self._site(op, layer, entered.path, module.path, branch, "residual", maps,
                           same.index(branch), len(same))
            )
        for op, pattern in (("mha", _ATTENTION), ("ffn", _FFN)):
            fallback = _outermost(calls, pattern)
            if fallback is None or op in {s.op for s in found} or fallback.left is None:
                continue
            if fallback.entered is None or [c.path for c in calls].count(fallback.path) > 1:
                continue
            before = [c for c in calls if c.left is not None and _NORM.search(_kind(c.module))
                      and equal(c.left, fallback.entered) and c.entered is not None]
            enter = before[0].path if before else fallback.path
            found.append(
                self._site(op, layer, enter, fallback.path, fallback, "shape", maps, 0, 1)  # type: ignore[arg-type]
            )
        if not found:
            return False
        self.layer = layer
        rows = declared_sites(type(own.module).__name__, block.path)
        found = [replace(s, **rows.get(s.op, {})) for s in found]
        # A layer lends its maps to all its sites: queries of FFN and block tuners come from there.
        found = [replace(s, maps=maps, name=f"{s.op}.{layer}") for s in found]
        own_site = self._site("block", layer, block.path, block.path, own, "shape", maps, 0, 1)
        self.sites += [*found, own_site]
        self.readout.block(own.left)
        return True

    def _site(
        self, op: Op, layer: int, enter: str, module: str, leave: _Call, proof: Any,
        maps: Maps | None, nth: int, calls: int,
    ) -> Site:  # fmt: skip
        left = leave.left
        assert left is not None
        layout, dim = _layout(left, self.model.get_submodule(module))
        return Site(f"{op}.{layer}", op, layer, dim, enter, module, leave.path, nth, calls,
                    layout, proof, maps)  # fmt: skip

    def _maps(
        self, module: _Call, stream: Tensor, inside: list[_Call], calls: list[_Call], own: _Call
    ) -> Maps | None:
        # A post-norm attention ends after its own sum; then only its inner part is in the branch.
        parent = module.path.rpartition(".")[0]
        proposal = propose(self.model, module.path) or (
            propose(self.model, parent) if parent != own.path else None
        )
        if proposal is None:
            return None
        norm = next(
            (c for c in sorted(inside, key=lambda c: c.start)
             if _NORM.search(_kind(c.module)) and c.end < module.start and c.entered is not None
             and equal(c.entered, stream)), None)

        def seen(path: str) -> tuple[Tensor, Tensor] | None:
            for call in [*calls, own]:
                # A fused map is wider than the stream: its output is not kept, nor needed.
                if call.path == path and call.entered is not None:
                    return call.entered, call.left if call.left is not None else call.entered
            return None

        return prove(self.model, replace(proposal, norm=norm.path if norm else ""), seen)


def _sums(calls: list[_Call], own: _Call) -> list[tuple[int, _Call, _Call]]:
    """All `(time of the stream, who reads it, branch)` with `next == stream + branch output`."""
    streams: list[_Call] = []
    for call in sorted(calls, key=lambda c: c.start):
        if call.entered is not None and not any(
            equal(call.entered, s.entered) for s in streams  # type: ignore[arg-type]
        ):
            streams.append(call)
    nexts = [(s.start, s.entered) for s in streams[1:]] + [(own.end, own.left)]
    found: list[tuple[int, _Call, _Call]] = []
    for when, target in nexts:
        matches = [
            (stream.start, stream, branch)
            for stream in streams
            if stream.start < when
            for branch in calls
            if branch is not own and branch.left is not None
            and branch.start >= stream.start and branch.end <= when
            and _adds(stream.entered, branch.left, target)
        ]
        if matches:
            best = max(matches, key=lambda m: m[2].end)
            if not any(best[2] is known[2] for known in found):
                found.append(best)
    return found


def _adds(stream: Tensor | None, branch: Tensor, target: Tensor | None) -> bool:
    if stream is None or target is None:
        return False
    if not stream.numel() == branch.numel() == target.numel():
        return False
    s, b, t = stream.reshape(-1), branch.reshape(-1), target.reshape(-1)
    few = slice(0, 64)
    if (s[few] + b[few] - t[few]).abs().max() > SUM_TOLERANCE * (1 + t[few].abs().max()):
        return False
    if torch.equal(s, t):
        return False
    total = s + b
    return torch.equal(total, t) or bool(
        (total - t).abs().max() <= SUM_TOLERANCE * b.abs().max()
    )


def _kind(module: nn.Module) -> str:
    return type(module).__name__


def _outermost(calls: list[_Call], pattern: re.Pattern[str]) -> _Call | None:
    """The first call, not inside another such call, whose class or own name fits."""
    fits = [
        c for c in calls
        if (pattern.search(_kind(c.module)) or pattern.search(c.path.split(".")[-1]))
        and any(isinstance(m, (nn.Linear, nn.MultiheadAttention)) for m in c.module.modules())
    ]
    return min(fits, key=lambda c: c.start, default=None)


def _operation(inside: list[_Call]) -> tuple[Op | None, _Call | None]:
    attention = _outermost(inside, _ATTENTION)
    if attention is not None:
        cross = any(c.cross for c in inside if c.path.startswith(attention.path))
        return ("cross" if cross else "mha"), attention
    ffn = _outermost(inside, _FFN)
    if ffn is not None:
        return "ffn", ffn
    linear = [c for c in inside if isinstance(c.module, nn.Linear)]
    return ("ffn", linear[0]) if len(linear) >= 2 else (None, None)


def _layout(left: Tensor, module: nn.Module) -> tuple[Layout, int]:
    if left.dim() != 4:
        return "b n d", left.shape[-1]
    widths = {m.in_features for m in module.modules() if isinstance(m, nn.Linear)}
    if left.shape[-1] in widths:
        return "b h w d", left.shape[-1]
    return "b d h w", left.shape[1]
