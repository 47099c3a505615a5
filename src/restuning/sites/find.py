"""Structure proposes, one recorded forward proves: `next stream == stream + leave output`.

A block is an innermost member of a `ModuleList` or `Sequential` in which such a sum is seen, and
any other member of the same class (a first block of a stage that has no shortcut). For each sum
around an attention or MLP the stream read, the operation and the *latest* module of the branch are
kept, so that a tuner is added at the residual sum: after LayerScale and drop-path, which differ
per family. Where no sum is seen at all, `stages.py` looks for stages.
The finder only listens; the forward and its hooks belong to `host/find_sites.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from restuning._errors import NoSitesError
from restuning.runtime.precision import HALF_PRECISION
from restuning.sites.attention_inputs import (
    CONTEXT,
    read_attention_inputs,
    read_position_bias,
    returns_bias,
)
from restuning.sites.declare import Declaration
from restuning.sites.find_linear import find_linear_sites, number_linear_sites
from restuning.sites.find_readout import ReadoutListener
from restuning.sites.gated import find_gated_sums
from restuning.sites.linear import is_linear
from restuning.sites.linear_site import LinearSite
from restuning.sites.operations import Operations
from restuning.sites.readout import Readout
from restuning.sites.residual import is_residual
from restuning.sites.site import Site, Sites, is_hierarchy
from restuning.sites.stages import StageOutput, find_decoder_stages, list_stage_paths
from restuning.sites.sums import (
    ModuleCall,
    equal,
    find_layout,
    find_stream_part,
    first_tensor,
    is_attention,
    is_conv,
    take_stream,
)


@dataclass(eq=False, slots=True)
class _OpenBlock:
    """A candidate block whose forward is under way."""

    path: str
    input: Tensor
    stream: Tensor
    calls: list[ModuleCall] = field(default_factory=list)
    outer: bool = False


@dataclass(eq=False, slots=True)
class _Layer:
    """The sites of one block, numbered at the end."""

    start: int
    kind: type[nn.Module]
    sites: list[Site]
    linear: list[LinearSite]


class Finder:
    """Listens to one forward (`enter`, `leave` of every module) and says where the sites are."""

    def __init__(self, model: nn.Module, declared: Declaration | None = None) -> None:
        self.model = model
        self.declared = {} if declared is None else declared.layers
        if declared is not None:
            declared.check(model)
        self.readout = ReadoutListener(model)
        self.operations = Operations(model)
        self.layers: list[_Layer] = []
        self.without_sums: list[_Layer] = []
        self.clock = 0
        self.open_blocks: list[_OpenBlock] = []
        self.stack: list[ModuleCall] = []
        self.candidates = {
            f"{path}.{name}" if path else name
            for path, container in model.named_modules()
            if isinstance(container, (nn.ModuleList, nn.Sequential))
            for name, child in container.named_children()
            # A block is made of parts and computes something: no activation, no lone layer.
            if any(is_linear(m) or is_conv(m) for m in child.modules())
            and next(child.children(), None) is not None
        }
        self.candidates -= find_parts_of_layers(model, self.candidates)
        # What its user calls a block is one, and nothing inside it is.
        self.candidates = {
            path for path in self.candidates if not any(_is_inside(path, d) for d in self.declared)
        } | set(self.declared)
        self.stage_paths = list_stage_paths(model)
        self.stage_outputs: list[StageOutput] = []

    def enter(self, path: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """A module is about to run."""
        self.clock += 1
        x = first_tensor(args)
        positional = x is not None
        if x is None:
            x = kwargs.get("hidden_states", first_tensor(kwargs))
        x = x.detach() if isinstance(x, Tensor) and x.is_floating_point() else None
        self._prove_chain(x)
        if all(block.outer for block in self.open_blocks):
            self.readout.enter(path, module, x)
        if path in self.candidates and x is not None and x.dim() >= 3:
            # The tensor and a copy: at the end they differ if the block overwrote it in place.
            self.open_blocks.append(_OpenBlock(path, x, x.clone()))
        call = ModuleCall(path, module, self.clock, None, positional=positional)
        call.cross = any(kwargs.get(name) is not None for name in CONTEXT)
        # A norm that is given a condition as well (adaLN) is no function of the stream alone.
        call.alone = len(args) + sum(v is not None for v in kwargs.values()) == 1
        if self._listening:
            call.attention_inputs = read_attention_inputs(module, args, kwargs)
            # Clones, because a later in-place operation would change what was seen.
            call.input = None if x is None else x.clone()
            half = x is not None and x.dtype in HALF_PRECISION
            call.given = (args, kwargs) if half and is_attention(call) else None
        self.stack.append(call)

    def leave(self, path: str, output: Any) -> None:
        """A module has returned."""
        self.clock += 1
        call = self.stack.pop()
        call.end = self.clock
        block = (
            self.open_blocks[-1] if self.open_blocks and self.open_blocks[-1].path == path else None
        )
        call.part = find_stream_part(output, block.input) if block is not None else None
        y = take_stream(output, call.part)
        y = y.detach() if y is not None and y.is_floating_point() else None
        if path in self.stage_paths and y is not None and y.dim() == 4:
            self.stage_outputs.append(StageOutput(path, y))
        if self._listening:
            call.output = None if y is None else y.clone()
            # Tokens of both sequences in one attention: each reads itself and the other.
            call.cross = call.cross and not _returns_both_streams(
                output, call.attention_inputs.context
            )
            if returns_bias(call.module):
                call.attention_inputs = call.attention_inputs._replace(
                    bias=read_position_bias(output)
                )
        for block in self.open_blocks:
            if not block.outer:
                block.calls.append(call)
        if self.open_blocks and self.open_blocks[-1].path == path:
            block = self.open_blocks.pop()
            if not block.outer and self._analyse(block, call):
                # Around a block stands a stage, not a block: its calls and their tensors can go.
                for outer in self.open_blocks:
                    outer.outer = True
                    outer.calls.clear()
        if all(block.outer for block in self.open_blocks):
            self.readout.leave(path, y)

    @property
    def _listening(self) -> bool:
        return any(not block.outer for block in self.open_blocks)

    def conclude(self, output: Any) -> tuple[Sites, Readout]:
        """Conclude from what was heard where the sites are, and how the readout is made.

        Raises:
            NoSitesError: There are none, or a declared block is none.
        """
        self._check_declared()
        if not self.layers:
            raise NoSitesError(
                "no place to tune was found",
                where=type(self.model).__name__,
                found=f"{len(self.candidates)} repeated blocks, none whose output is a sum with "
                "what it reads, and no chain of stages",
                fix="declare them: Host(model, x, sites=Sites.declare([Layer(...), ...]))",
            )
        layers = self._number_layers()
        sites = [
            replace(site, layer=number, name=f"{site.op}.{number}")
            for number, layer in layers
            for site in layer.sites
        ]
        linear = number_linear_sites((number, layer.linear) for number, layer in layers)
        stages = find_decoder_stages(self.stage_outputs, [s for s in sites if s.op == "block"])
        causal = any(
            (s.projections is not None and s.projections.causal)
            or getattr(self.model.get_submodule(s.module), "is_causal", False) is True
            for s in sites
        )
        hierarchy = is_hierarchy(Sites(sites).last_stack.values())
        readout = self.readout.conclude(
            output, causal=causal, hierarchy=hierarchy, first=sites[-1].channels_first
        )
        # What runs after the last block may prove nothing, but a readout that fits has read it.
        if sites[-1].op == "block" and readout.proof == "exact":
            sites[-1] = replace(sites[-1], proof="residual")
        return Sites([*sites, *stages], linear), readout

    def _check_declared(self) -> None:
        blocks = {layer.sites[-1].module for layer in self.layers}
        missing = [path for path in self.declared if path not in blocks]
        if missing:
            raise NoSitesError(
                "a declared block is none",
                where=missing[0],
                found="it did not run in the example's forward, or does not read and return a stream "
                "(b n d, or a map)",
                fix="declare modules that read a stream first and return the next one",
            )

    def _number_layers(self) -> list[tuple[int, _Layer]]:
        """All layers, numbered in the order in which they ran.

        Blocks without a sum of their own count if another of their class has shown one.
        """
        kinds = {layer.kind for layer in self.layers}
        blocks = {layer.sites[-1].module for layer in self.layers}
        plain = {
            layer.sites[-1].module: layer for layer in self.without_sums if layer.kind in kinds
        }
        first = [
            layer
            for path, layer in plain.items()
            if not any(_is_inside(path, block) for block in blocks)
        ]
        layers = sorted([*first, *self.layers], key=lambda layer: layer.start)
        return list(enumerate(layers, 1))

    def _prove_chain(self, x: Tensor | None) -> None:
        """The last block's output is a stream if the next module reads just that."""
        if x is None or not self.layers or self.readout.last is None:
            return
        sites = self.layers[-1].sites
        # The block's own site stands last in its layer.
        if sites[-1].proof == "shape" and equal(x, self.readout.last):
            sites[-1] = replace(sites[-1], proof="residual")

    def _analyse(self, block: _OpenBlock, own: ModuleCall) -> bool:
        if own.output is None or own.output.dim() < 3:
            return False
        if any(block.path == layer.sites[-1].module for layer in self.layers):
            return True
        # In the order in which they returned: what is added last returns last.
        calls = sorted((c for c in block.calls if c is not own), key=lambda c: c.end)
        declared = self.declared.get(block.path)
        sites = [] if declared is None else self.operations.check_declared(declared, own, calls)
        # Where a block changes the size of the stream there is no sum with what entered.
        if own.output.numel() == block.stream.numel():
            earlier = [(s.op, s.leave) for s in sites]
            sites += [
                s
                for s in self.operations.find_in_block(block.stream, own, calls)
                if not any(s.op == op or s.leave == leave for op, leave in earlier)
            ]
        kind = type(own.module)
        projections = next(
            (s.projections for s in sites if s.op == "mha" and s.projections is not None), None
        )
        _, dim_in = find_layout(block.stream, own.module, [own, *calls])
        # A first activation in place leaves nothing of the stream that a tuner could still read.
        changes = own.output.shape != block.stream.shape or not equal(block.input, block.stream)
        own_site = self.operations.make_site(
            "block", block.path, block.path, own, [own, *calls], "shape"
        )
        own_site = replace(own_site, changes=changes, dim_in=dim_in, part=own.part)
        # A layer lends its projections to all its sites: queries of FFN and block tuners come from
        # there.
        gated = any(s.gated for s in sites)
        sites = [
            s if s.op == "cross" or gated else replace(s, projections=projections)
            for s in [*sites, own_site]
        ]
        linear = find_linear_sites(self.model, sites, own, calls, own_site.dim)
        layer = _Layer(own.start, kind, sites, linear)
        named = kind not in _CONTAINERS
        if (
            block.path in self.declared
            or len(sites) > 1
            or is_residual(calls, own)
            or find_gated_sums(calls, own, block.stream)
            or (named and any(kind is earlier.kind for earlier in self.layers))
        ):
            self.layers.append(layer)
            self.readout.note_block(own.output)
            return True
        # Its class may turn out to be a block's later (a first block without a shortcut).
        if named:
            self.without_sums.append(layer)
        return False


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""Their class says nothing about what they compute."""


def _returns_both_streams(output: Any, context: Tensor | None) -> bool:
    others = output[1:] if isinstance(output, tuple) else ()
    return context is not None and any(
        isinstance(t, Tensor) and t.shape == context.shape for t in others
    )


def _is_inside(path: str, other: str) -> bool:
    return f"{path}.".startswith(f"{other}.")


def find_parts_of_layers(model: nn.Module, candidates: Iterable[str]) -> set[str]:
    """Candidates that are parts of one layer, not layers.

    T5 keeps self-attention, cross-attention and feed-forward of a layer in a list: inside another
    candidate, two or more members, no two of one class. (What a `Sequential` holds is a chain.)
    """
    paths = set(candidates)
    parts: set[str] = set()
    for path in paths:
        container = path.rpartition(".")[0]
        owner = container.rpartition(".")[0]
        members = model.get_submodule(container)
        if owner not in paths or not isinstance(members, nn.ModuleList):
            continue
        classes = [type(m) for m in members.children()]
        # Layers of a stack repeat a class, the parts of one layer do not.
        if len(classes) > 1 and len(set(classes)) == len(classes):
            parts.add(path)
    return parts
