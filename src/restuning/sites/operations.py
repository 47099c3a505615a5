"""The operations of one block that was heard: its sums, and the projections of its attentions."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from restuning._errors import NoSitesError, ProjectionsError
from restuning.sites.declare import Branch, Layer
from restuning.sites.gated import gated_sums
from restuning.sites.projections import Projections
from restuning.sites.prove_projections import propose, prove, prove_declared
from restuning.sites.site import Op, Site
from restuning.sites.sums import (
    ATTENTION,
    FFN,
    NORM,
    Heard,
    equal,
    is_sum,
    kind_of,
    layout_of,
    operation,
    outermost,
    sums,
)

_BY_NAME: tuple[tuple[Op, re.Pattern[str]], ...] = (("mha", ATTENTION), ("ffn", FFN))
"""Operations that are known by the name of their module where no sum was seen around them."""


class Operations:
    """Finds the sites inside blocks of a backbone.

    Args:
        model: The backbone.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def of(self, stream: Tensor, own: Heard, calls: list[Heard]) -> list[Site]:
        """The sites of a block, without its own and without their layer, which is known later."""
        found_sums = sums([own, *calls], own)
        if not any(branch.end == max(c.end for c in calls) for _, _, branch in found_sums):
            gated = self._gated(stream, own, calls)
            if gated:
                return gated
        found: list[Site] = []
        since = 0
        for start, entered, branch in found_sums:
            inside = [c for c in calls if c.start >= max(start, since) and c.end <= branch.end]
            since = branch.end
            op, module = operation(inside)
            if op is None or module is None or entered.entered is None:
                continue
            if op in {s.op for s in found}:
                continue
            projections = None
            if op in ("mha", "cross"):
                projections = self._prove_projections(
                    module, entered.entered, inside, calls, own, branch
                )
            same = [c for c in sorted(calls, key=lambda c: c.start) if c.path == branch.path]
            site = self.site(op, entered.path, module.path, branch, calls, "residual")
            found.append(
                replace(site, nth=same.index(branch), calls=len(same), projections=projections)
            )
        for op, pattern in _BY_NAME:
            fallback = outermost(calls, pattern)
            if fallback is None or op in {s.op for s in found} or fallback.left is None:
                continue
            if fallback.entered is None or [c.path for c in calls].count(fallback.path) > 1:
                continue
            if not fallback.entered.numel() == fallback.left.numel() == stream.numel():
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
            found.append(self.site(op, enter, fallback.path, fallback, calls, "shape"))
        return found

    def declared(self, layer: Layer, own: Heard, calls: list[Heard]) -> list[Site]:
        """The sites of a block that its user declared, held against what was heard.

        Args:
            layer: The declaration.
            own: The block's call.
            calls: Those inside it.

        Raises:
            NoSitesError: A declared module did not run, or its shapes are not those of a branch.
            ProjectionsError: Declared projections do not give what the layer returned.
        """
        return [self._declared(op, branch, own, calls) for op, branch in layer.branches()]

    def _declared(self, op: Op, branch: Branch, own: Heard, calls: list[Heard]) -> Site:
        in_order = sorted(calls, key=lambda c: c.start)

        def ran(path: str, since: int = 0) -> Heard:
            call = next((c for c in in_order if c.path == path and c.end >= since), None)
            if call is None:
                after = f" after {branch.module}" if since else ""
                raise NoSitesError(
                    "a declared module did not run",
                    where=f"{path} ({op} of {own.path})",
                    found=f"the block's forward called others{after}",
                    fix="declare a module that the block calls",
                )
            return call

        module, enter = ran(branch.module), ran(branch.enter)
        leave = ran(branch.leave, module.end)
        stream, added = enter.entered, leave.left
        if stream is None or added is None or stream.numel() != added.numel():
            shapes = [None if t is None else tuple(t.shape) for t in (stream, added)]
            raise NoSitesError(
                "a declared branch cannot be added to its stream",
                where=f"{op} of {own.path}",
                found=f"{branch.enter} reads {shapes[0]}, {branch.leave} returns {shapes[1]}",
                fix="name as `enter` a module that reads the stream, and as `leave` one whose output "
                "is added to it",
            )
        targets = [c.entered for c in in_order if c.start >= leave.end]
        seen = any(is_sum(stream, added, target) for target in (*targets, own.left))
        site = self.site(
            op, enter.path, module.path, leave, calls, "residual" if seen else "declared"
        )
        same = [c for c in in_order if c.path == leave.path]
        inside = [c for c in calls if c.start >= enter.start and c.end <= leave.end]
        projections = self._prove_declared_projections(
            branch, module, enter, inside, own, calls, leave
        )
        return replace(site, nth=same.index(leave), calls=len(same), projections=projections)

    def _prove_declared_projections(
        self,
        branch: Branch,
        module: Heard,
        enter: Heard,
        inside: list[Heard],
        own: Heard,
        calls: list[Heard],
        leave: Heard,
    ) -> Projections | None:
        stream = enter.entered
        assert stream is not None
        if branch.projections is None:
            return self._prove_projections(module, stream, inside, calls, own, leave)
        projections = branch.projections
        if not projections.norm and enter is not module:
            # What reads the stream before the operation is its norm, whatever its name.
            projections = replace(projections, norm=enter.path)
        proved = prove_declared(
            self.model,
            projections,
            lambda path: next((c for c in [*calls, own] if c.path == path), None),
            leave,
        )
        reads = next(c.entered for c in calls if c.path == proved.q)
        # Windows of a stream are read in another shape, and cannot be compared with it.
        alike = reads is not None and reads.shape == stream.shape
        if alike and not self._norm_alone(proved, stream, calls):
            raise ProjectionsError(
                "the declared projections are not those of the layer",
                where=proved.module,
                found=f"W_q does not read what {proved.norm or 'no norm'} makes of the stream",
                fix="name the norm before W_q: Projections.declare(..., norm=...)",
            )
        return proved

    def _gated(self, stream: Tensor, own: Heard, calls: list[Heard]) -> list[Site]:
        """Sites of a block whose branches pass a gate that is no module."""
        found: list[Site] = []
        since = 0
        for step in gated_sums(calls, own, stream):
            branch, first = step.branch, max(step.since, since)
            inside = [c for c in calls if c.start >= first and c.end <= branch.end]
            since = branch.end
            op, module = operation(inside)
            # An attention and a feed-forward side by side end in one map: that is their block.
            side = outermost(inside, FFN, conv=True) if op == "mha" else None
            if op is None or module is None or side is not None or op in {s.op for s in found}:
                continue
            entered = step.reader.entered
            assert entered is not None
            projections = None
            if op in ("mha", "cross"):
                projections = self._prove_projections(module, entered, inside, calls, own, branch)
                projections = (
                    projections
                    if projections is not None and self._norm_alone(projections, entered, calls)
                    else None
                )
            site = self.site(op, step.reader.path, module.path, branch, calls, "residual")
            if not step.plain:
                site = replace(site, leave=own.path, part=own.part, gated=True, via=step.via)
            found.append(replace(site, projections=projections))
        return found

    def _norm_alone(self, projections: Projections, stream: Tensor, calls: list[Heard]) -> bool:
        """Whether what W_q read is what the layer's norm, given nothing else, made of the stream."""
        reads = next((c.entered for c in calls if c.path == projections.q), None)
        norm = next((c for c in calls if c.path == projections.norm), None)
        made = stream if norm is None else norm.left if norm.alone else None
        return reads is not None and made is not None and equal(reads, made)

    def site(
        self, op: Op, enter: str, module: str, leave: Heard, calls: list[Heard], proof: Any
    ) -> Site:
        """One site, without its layer."""
        left = leave.left
        assert left is not None
        layout, dim = layout_of(left, self.model.get_submodule(module), calls)
        return Site(op, op, 0, dim, enter, module, leave.path, layout=layout, proof=proof)

    def _prove_projections(
        self,
        module: Heard,
        stream: Tensor,
        inside: list[Heard],
        calls: list[Heard],
        own: Heard,
        leave: Heard,
    ) -> Projections | None:
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

        projections = replace(proposal, norm=norm.path if norm else "")
        return prove(self.model, projections, heard, leave)
