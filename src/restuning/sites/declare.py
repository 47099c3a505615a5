"""Sites and projections that a user declares, where structure alone does not show them.

A declaration names modules; widths, layouts and the calls that count are still measured in the one
forward that `Host` runs, and what can be proved is proved there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from restuning._errors import NoSitesError
from restuning.sites.projections import Projections

Op = Literal["mha", "cross", "ffn", "block", "stage"]
"""An operation: attention, attention to another sequence, feed-forward; a block; a decoder's stage."""

_PATHS = ("q", "k", "v", "out", "norm", "q_norm", "k_norm")


@dataclass(frozen=True, slots=True)
class Branch:
    """An operation of a layer, `next stream = stream + module(...)`.

    All paths are relative to the block, so that one `Branch` serves all layers of a kind.

    Attributes:
        module: Path of the operation: the attention, the feed-forward.
        enter: Path of the module whose first input is the stream, as a rule the norm before the
            operation; "" for the operation itself.
        leave: Path of the module whose output is added to the stream, such as a LayerScale after
            the operation; "" for the operation itself.
        projections: W_q, W_k, W_v and W_o of an attention (`Projections.declare`); None to look for
            them under the usual names.
    """

    module: str
    enter: str = ""
    leave: str = ""
    projections: Projections | None = None


@dataclass(frozen=True, slots=True)
class Layer:
    """A block, a module that reads a stream and returns the next one, and the operations in it.

    Operations that are not declared are looked for.

    Attributes:
        block: Path of the block in the backbone.
        mha: Its self-attention.
        cross: Its attention to another sequence.
        ffn: Its feed-forward.
    """

    block: str
    mha: Branch | None = None
    cross: Branch | None = None
    ffn: Branch | None = None

    def branches(self) -> Iterator[tuple[Op, Branch]]:
        """`(operation, branch)` of those that are declared, with whole paths."""
        declared: dict[Op, Branch | None] = {"mha": self.mha, "cross": self.cross, "ffn": self.ffn}
        for op, branch in declared.items():
            if branch is not None:
                yield op, self._with_whole_paths(branch)

    def _with_whole_paths(self, branch: Branch) -> Branch:
        def whole(path: str) -> str:
            return f"{self.block}.{path}"

        projections = branch.projections
        if projections is not None:
            named = {n: whole(p) for n in _PATHS if (p := getattr(projections, n))}
            projections = replace(projections, module=whole(branch.module), **named)
        return Branch(
            whole(branch.module),
            whole(branch.enter or branch.module),
            whole(branch.leave or branch.module),
            projections,
        )


@dataclass(frozen=True, slots=True)
class Declaration:
    """Layers of one backbone as its user declares them; `Sites.declare` makes one.

    Attributes:
        layers: By the path of their block.
    """

    layers: dict[str, Layer]

    @classmethod
    def of(cls, layers: Iterable[Layer]) -> Declaration:
        """Make a declaration from layers, each block once.

        Raises:
            NoSitesError: None at all, or a block twice.
        """
        by_block: dict[str, Layer] = {}
        for layer in layers:
            if layer.block in by_block:
                raise NoSitesError(
                    "a block is declared twice", where=layer.block, fix="declare each block once"
                )
            by_block[layer.block] = layer
        if not by_block:
            raise NoSitesError(
                "a declaration without layers",
                fix='Sites.declare([Layer("path.of.a.block", ...), ...])',
            )
        return cls(by_block)

    def check(self, model: nn.Module) -> None:
        """Refuse names of modules that the backbone does not have.

        Raises:
            NoSitesError: Names the first of them.
        """
        modules = {path for path, _ in model.named_modules()}
        for layer in self.layers.values():
            places = [("block", layer.block)]
            for op, branch in layer.branches():
                places += [(f"{op}: {n}", getattr(branch, n)) for n in ("module", "enter", "leave")]
                if branch.projections is not None:
                    places += [(f"{op}: {n}", getattr(branch.projections, n)) for n in _PATHS]
            for what, path in places:
                if path and path not in modules:
                    parent = path.rpartition(".")[0]
                    inside = [n for n in modules if n and n.rpartition(".")[0] == parent]
                    raise NoSitesError(
                        "a declared module does not exist",
                        where=f"{path} ({what} of the layer {layer.block})",
                        found=f"{parent or 'the backbone'} holds {', '.join(sorted(inside)[:6])}"
                        if inside
                        else f"there is no {parent} either",
                        fix="print([name for name, _ in model.named_modules()]) lists them",
                    )
