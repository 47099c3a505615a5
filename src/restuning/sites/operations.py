"""The operations of one block that was heard: its sums, and the projections of its attentions."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from restuning._errors import NoSitesError, ProjectionsError
from restuning.sites.declare import Branch, Layer
from restuning.sites.gated import find_gated_sums
from restuning.sites.projections import Projections
from restuning.sites.prove_projections import propose, prove, prove_declared
from restuning.sites.site import Op, Site
from restuning.sites.sums import (
    ATTENTION,
    FFN,
    NORM,
    ModuleCall,
    equal,
    find_layout,
    find_operation,
    find_outermost,
    find_sums,
    is_sum,
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

    def find_in_block(self, stream: Tensor, own: ModuleCall, calls: list[ModuleCall]) -> list[Site]:
        """The sites of a block, without its own and without their layer, which is known later."""
        found_sums = find_sums([own, *calls], own)
        # No plain sum ends the block: its last branch may pass a gate.
        if not any(branch.end == max(c.end for c in calls) for _, _, branch in found_sums):
            gated = self._find_gated_sites(stream, own, calls)
            if gated:
                return gated
        sites: list[Site] = []
        since = 0
        for start, entered, branch in found_sums:
            inside = [c for c in calls if c.start >= max(start, since) and c.end <= branch.end]
            since = branch.end
            op, module = find_operation(inside)
            # A sum around anything else (a mixer of convolutions) is left to the block's site.
            if op is None or module is None or entered.input is None:
                continue
            # One site an operation: of two feed-forwards around an attention (Macaron) the first.
            if op in {s.op for s in sites}:
                continue
            projections = None
            if op in ("mha", "cross"):
                projections = self._prove_projections(
                    module, entered.input, inside, calls, own, branch
                )
            same = [c for c in sorted(calls, key=lambda c: c.start) if c.path == branch.path]
            site = self.make_site(op, entered.path, module.path, branch, calls, "residual")
            sites.append(
                replace(site, nth=same.index(branch), calls=len(same), projections=projections)
            )
        for op, pattern in _BY_NAME:
            fallback = find_outermost(calls, pattern)
            if fallback is None or op in {s.op for s in sites} or fallback.output is None:
                continue
            # Called twice, it cannot be told which call a tuner belongs to.
            if fallback.input is None or [c.path for c in calls].count(fallback.path) > 1:
                continue
            if not fallback.input.numel() == fallback.output.numel() == stream.numel():
                continue
            before = [
                c
                for c in calls
                if c.output is not None
                and NORM.search(type(c.module).__name__)
                and equal(c.output, fallback.input)
                and c.input is not None
            ]
            enter = before[0].path if before else fallback.path
            sites.append(self.make_site(op, enter, fallback.path, fallback, calls, "shape"))
        return sites

    def check_declared(self, layer: Layer, own: ModuleCall, calls: list[ModuleCall]) -> list[Site]:
        """The sites of a block that its user declared, held against what was heard.

        Args:
            layer: The declaration.
            own: The block's call.
            calls: Those inside it.

        Raises:
            NoSitesError: A declared module did not run, or its shapes are not those of a branch.
            ProjectionsError: Declared projections do not give what the layer returned.
        """
        return [self._check_branch(op, branch, own, calls) for op, branch in layer.branches()]

    def _check_branch(
        self, op: Op, branch: Branch, own: ModuleCall, calls: list[ModuleCall]
    ) -> Site:
        in_order = sorted(calls, key=lambda c: c.start)

        def find_call(path: str, since: int = 0) -> ModuleCall:
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

        module, enter = find_call(branch.module), find_call(branch.enter)
        leave = find_call(branch.leave, module.end)
        stream, added = enter.input, leave.output
        if stream is None or added is None or stream.numel() != added.numel():
            shapes = [None if t is None else tuple(t.shape) for t in (stream, added)]
            raise NoSitesError(
                "a declared branch cannot be added to its stream",
                where=f"{op} of {own.path}",
                found=f"{branch.enter} reads {shapes[0]}, {branch.leave} returns {shapes[1]}",
                fix="name as `enter` a module that reads the stream, and as `leave` one whose output "
                "is added to it",
            )
        # The next stream is what a later module reads, or what the block returns.
        targets = [c.input for c in in_order if c.start >= leave.end]
        seen = any(is_sum(stream, added, target) for target in (*targets, own.output))
        site = self.make_site(
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
        module: ModuleCall,
        enter: ModuleCall,
        inside: list[ModuleCall],
        own: ModuleCall,
        calls: list[ModuleCall],
        leave: ModuleCall,
    ) -> Projections | None:
        stream = enter.input
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
        reads = next(c.input for c in calls if c.path == proved.q)
        # Windows of a stream are read in another shape, and cannot be compared with it.
        alike = reads is not None and reads.shape == stream.shape
        if alike and not self._reads_norm_alone(proved, stream, calls):
            raise ProjectionsError(
                "the declared projections are not those of the layer",
                where=proved.module,
                found=f"W_q does not read what {proved.norm or 'no norm'} makes of the stream",
                fix="name the norm before W_q: Projections.declare(..., norm=...)",
            )
        return proved

    def _find_gated_sites(
        self, stream: Tensor, own: ModuleCall, calls: list[ModuleCall]
    ) -> list[Site]:
        """Sites of a block whose branches pass a gate that is no module."""
        sites: list[Site] = []
        since = 0
        for step in find_gated_sums(calls, own, stream):
            branch, first = step.branch, max(step.since, since)
            inside = [c for c in calls if c.start >= first and c.end <= branch.end]
            since = branch.end
            op, module = find_operation(inside)
            # An attention and a feed-forward side by side end in one map: that is their block.
            side = find_outermost(inside, FFN, conv=True) if op == "mha" else None
            if op is None or module is None or side is not None or op in {s.op for s in sites}:
                continue
            entered = step.reader.input
            assert entered is not None
            projections = None
            if op in ("mha", "cross"):
                projections = self._prove_projections(module, entered, inside, calls, own, branch)
                projections = (
                    projections
                    if projections is not None
                    and self._reads_norm_alone(projections, entered, calls)
                    else None
                )
            site = self.make_site(op, step.reader.path, module.path, branch, calls, "residual")
            # Behind the gate the delta would be scaled by it: it is added at the block's end.
            if not step.plain:
                site = replace(site, leave=own.path, part=own.part, gated=True, via=step.via)
            sites.append(replace(site, projections=projections))
        return sites

    def _reads_norm_alone(
        self, projections: Projections, stream: Tensor, calls: list[ModuleCall]
    ) -> bool:
        """Whether what W_q read is what the layer's norm, given nothing else, made of the stream."""
        reads = next((c.input for c in calls if c.path == projections.q), None)
        norm = next((c for c in calls if c.path == projections.norm), None)
        made = stream if norm is None else norm.output if norm.alone else None
        return reads is not None and made is not None and equal(reads, made)

    def make_site(
        self,
        op: Op,
        enter: str,
        module: str,
        leave: ModuleCall,
        calls: list[ModuleCall],
        proof: Any,
    ) -> Site:
        """One site, without its layer."""
        left = leave.output
        assert left is not None
        layout, dim = find_layout(left, self.model.get_submodule(module), calls)
        return Site(op, op, 0, dim, enter, module, leave.path, layout=layout, proof=proof)

    def _prove_projections(
        self,
        module: ModuleCall,
        stream: Tensor,
        inside: list[ModuleCall],
        calls: list[ModuleCall],
        own: ModuleCall,
        leave: ModuleCall,
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
                # The norm that reads the very stream and runs before the attention.
                if NORM.search(type(c.module).__name__)
                and c.end < module.start
                and c.input is not None
                and equal(c.input, stream)
            ),
            None,
        )

        def find_call(path: str) -> ModuleCall | None:
            return next((c for c in [*calls, own] if c.path == path), None)

        projections = replace(proposal, norm=norm.path if norm else "")
        return prove(self.model, projections, find_call, leave)
