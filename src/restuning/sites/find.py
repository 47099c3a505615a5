"""Structure proposes, one recorded forward proves: `next stream == stream + leave output`.

A block is an innermost member of a `ModuleList` or `Sequential` in which such a sum is seen. For
each sum the stream read, the operation and the *latest* module of the branch are kept, so that a
tuner is added at the residual sum: after LayerScale and drop-path, which differ per family.
The finder only listens; the forward and its hooks belong to `host.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from restuning._errors import NoSitesError
from restuning.sites.families import declared_sites
from restuning.sites.given import CONTEXT, given, returned_bias, returns_bias
from restuning.sites.linear import is_linear
from restuning.sites.maps import Maps
from restuning.sites.prove import propose, prove
from restuning.sites.readout import Readout, ReadoutListener
from restuning.sites.site import Op, Site, Sites
from restuning.sites.stacks import parts
from restuning.sites.sums import (
    ATTENTION,
    FFN,
    NORM,
    Heard,
    equal,
    first_tensor,
    kind_of,
    layout_of,
    operation,
    outermost,
    sums,
)


@dataclass(eq=False, slots=True)
class _Open:
    """A candidate block whose forward is under way."""

    path: str
    stream: Tensor
    calls: list[Heard] = field(default_factory=list)
    outer: bool = False


class Finder:
    """Listens to one forward (`enter`, `leave` of every module) and says where the sites are."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.readout = ReadoutListener(model)
        self.sites: list[Site] = []
        self.layer = 0
        self.clock = 0
        self.open: list[_Open] = []
        self.stack: list[Heard] = []
        self.candidates = {
            f"{path}.{name}" if path else name
            for path, container in model.named_modules()
            if isinstance(container, (nn.ModuleList, nn.Sequential))
            for name, child in container.named_children()
            if any(is_linear(m) for m in child.modules())
            and next(child.children(), None) is not None
        }
        self.candidates -= parts(model, self.candidates)

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
        call = Heard(path, module, self.clock, None)
        call.cross = any(kwargs.get(name) is not None for name in CONTEXT)
        if self.open:
            call.given = given(module, args, kwargs)
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
        if self.open and returns_bias(call.module):
            call.given = call.given._replace(bias=returned_bias(output))
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

    def _analyse(self, block: _Open, own: Heard) -> bool:
        stream = block.stream
        if own.left is None or own.left.numel() != stream.numel():
            return False
        calls = sorted((c for c in block.calls if c is not own), key=lambda c: c.end)
        found_sums = sums([own, *calls], own)
        layer = self.layer + 1
        found: list[Site] = []
        maps: Maps | None = None
        since = 0
        for start, entered, branch in found_sums:
            inside = [c for c in calls if c.start >= max(start, since) and c.end <= branch.end]
            since = branch.end
            op, module = operation(inside)
            if op is None or module is None or entered.entered is None:
                continue
            if op in {s.op for s in found}:
                continue
            lent = None
            if op in ("mha", "cross"):
                lent = self._maps(module, entered.entered, inside, calls, own, branch)
                maps = lent if op == "mha" else maps
            same = [c for c in sorted(calls, key=lambda c: c.start) if c.path == branch.path]
            found.append(
                self._site(
                    op,
                    layer,
                    entered.path,
                    module.path,
                    branch,
                    "residual",
                    lent,
                    same.index(branch),
                    len(same),
                )
            )
        for op, pattern in (("mha", ATTENTION), ("ffn", FFN)):
            fallback = outermost(calls, pattern)
            if fallback is None or op in {s.op for s in found} or fallback.left is None:
                continue
            if fallback.entered is None or [c.path for c in calls].count(fallback.path) > 1:
                continue
            before = [
                c
                for c in calls
                if c.left is not None
                and NORM.search(kind_of(c.module))
                and equal(c.left, fallback.entered)
                and c.entered is not None
            ]
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
        found = [s if s.op == "cross" else replace(s, maps=maps) for s in found]
        own_site = self._site("block", layer, block.path, block.path, own, "shape", maps, 0, 1)
        self.sites += [*found, own_site]
        self.readout.block(own.left)
        return True

    def _site(
        self, op: Op, layer: int, enter: str, module: str, leave: Heard, proof: Any,
        maps: Maps | None, nth: int, calls: int,
    ) -> Site:  # fmt: skip
        left = leave.left
        assert left is not None
        layout, dim = layout_of(left, self.model.get_submodule(module))
        return Site(f"{op}.{layer}", op, layer, dim, enter, module, leave.path, nth, calls,
                    layout, proof, maps)  # fmt: skip

    def _maps(
        self, module: Heard, stream: Tensor, inside: list[Heard], calls: list[Heard], own: Heard,
        leave: Heard,
    ) -> Maps | None:  # fmt: skip
        # A post-norm attention ends after its own sum; then only its inner part is in the branch.
        parent = module.path.rpartition(".")[0]
        proposal = propose(self.model, module.path) or (
            propose(self.model, parent) if parent != own.path else None
        )
        if proposal is None:
            return None
        norm = next(
            (
                c
                for c in sorted(inside, key=lambda c: c.start)
                if NORM.search(kind_of(c.module))
                and c.end < module.start
                and c.entered is not None
                and equal(c.entered, stream)
            ),
            None,
        )

        def heard(path: str) -> Heard | None:
            return next((c for c in [*calls, own] if c.path == path), None)

        maps = replace(proposal, norm=norm.path if norm else "")
        return prove(self.model, maps, heard, leave)
