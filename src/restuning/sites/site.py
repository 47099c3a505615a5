"""A site is a place where a network computes `next = stream + OP(stream)`: plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from restuning._errors import NoSitesError
from restuning.sites.declare import Declaration, Layer, Op
from restuning.sites.linear_site import LinearSite, LinearSites, pick_layers
from restuning.sites.projections import Projections

Layout = Literal["b n d", "b d n", "b h w d", "b d h w"]
Proof = Literal["residual", "shape", "declared"]


@dataclass(frozen=True, slots=True)
class Site:
    """One place to tune.

    Attributes:
        name: `mha.3`; what files store. Layers count from 1; `block.0` is the embedding output.
        op: The operation: mha, cross, ffn or block; or stage, a module of a decoder on maps that
            holds blocks (mid and up blocks of a UNet), numbered by themselves.
        layer: Layer number, 1 to L.
        dim: Width d of the stream here.
        enter: Path of the module whose first input is the stream x.
        module: Path of the operation itself.
        leave: Path of the module whose output is added to the stream; a tuner is added to it.
        nth, calls: The leave module's call that counts, of how many in one forward (some
            backbones share one drop-path module between both sums of a block).
        layout: Axes of the stream; tuners and taps always have channels last.
        changes: Whether a tuner reads OP's output here, because what enters has another width or
            grid (the first block of a stage), or is overwritten in place.
        dim_in: Width of what enters a block, 0 for d.
        part: Which of the leave module's outputs is the stream (joint blocks of text and image
            return two); None for the first tensor.
        gated: Whether a gate that is no module stands between OP and the sum (adaLN); `leave` is
            then the block, whose output the tuner is added to.
        via: Where gated: modules that read the stream between this sum and the block's end; the
            tuner is added to what they read as well.
        proof: "residual": `next == stream + leave output` was seen in one forward (block: what it
            returns is what the next module reads); "shape": only the shapes fit; "declared": said
            by the user (`Sites.declare`), and no such sum was seen.
        projections: W_q, W_k, W_v and W_o of this layer's attention, if they were proved.
    """

    name: str
    op: Op
    layer: int
    dim: int
    enter: str
    module: str
    leave: str
    nth: int = 0
    calls: int = 1
    layout: Layout = "b n d"
    proof: Proof = "residual"
    projections: Projections | None = None
    changes: bool = False
    dim_in: int = 0
    part: int | None = None
    gated: bool = False
    via: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The name without a dot, a legal key of a `ModuleDict`."""
        return self.name.replace(".", "_")

    @property
    def reads(self) -> str:
        """Where a tuner reads, in words."""
        if self.changes:
            return f"output of {self.leave}"
        return f"input of {self.enter or 'the model'}"

    @property
    def channels_first(self) -> bool:
        """Whether channels stand before the grid in the backbone."""
        return self.layout in ("b d n", "b d h w")

    def enters_channels_first(self, x: Tensor) -> bool:
        """Whether what enters this block has its channels before the grid, told by its width."""
        width = self.dim_in or self.dim
        # A block may read another layout than it returns; where both fit, its own decides.
        return x.shape[1] == width and (self.channels_first or x.shape[-1] != width)

    @property
    def adds(self) -> str:
        """Where a tuner adds, in words."""
        call = f" (call {self.nth + 1} of {self.calls})" if self.calls > 1 else ""
        before = "".join(f"input of {path}, " for path in self.via)
        return f"{before}output of {self.leave}{call}"


class Sites(Mapping[str, Site]):
    """The sites of one backbone, by name, in the order of the forward.

    Attributes:
        linear: Its linear sites, which are none of these: they stand inside operations, and a
            backbone is known by the others.
    """

    def __init__(self, sites: Iterable[Site], linear: Iterable[LinearSite] = ()) -> None:
        self._sites = {site.name: site for site in sites}
        self.linear = LinearSites(linear)

    def __getitem__(self, name: str) -> Site:
        """The site of a name.

        Raises:
            NoSitesError: No such site.
        """
        try:
            return self._sites[name]
        except KeyError:
            raise NoSitesError(
                "no such site",
                where=str(name),
                found=f"{len(self)} sites: {', '.join(list(self)[:6])} ...",
                fix="print(host.sites) lists them",
            ) from None

    def __contains__(self, name: object) -> bool:
        """Whether a site of this name is there."""
        return name in self._sites

    def __iter__(self) -> Iterator[str]:
        """Names in the order of the forward."""
        return iter(self._sites)

    def __len__(self) -> int:
        """Number of sites."""
        return len(self._sites)

    @property
    def layers(self) -> int:
        """Number L of layers."""
        return max((site.layer for site in self.values()), default=0)

    @property
    def stems(self) -> dict[str, Site]:
        """Taps of embedding outputs, and the block each of them enters.

        `block.0`, and in an encoder-decoder `start.l`, what enters the decoder's first layer l.
        """
        layers = find_stack_starts(self.values())
        return {
            "start." + str(layer) if layer > layers[0] else "block.0": self[f"block.{layer}"]
            for layer in layers
        }

    @property
    def taps(self) -> tuple[str, ...]:
        """`block.0` (the embedding output) to `block.L`, with a `start.l` before a decoder.

        After them `stage.1` to `stage.S`, where there are stages.
        """
        before = {site.name: tap for tap, site in self.stems.items()}
        stages = [s.name for s in self.values() if s.op == "stage"]
        # Stages hold blocks, and return after them.
        names = [*(s.name for s in self.values() if s.op == "block"), *stages]
        return tuple(tap for n in names for tap in ([before[n], n] if n in before else [n]))

    @property
    def last_stack(self) -> Sites:
        """The layers that the readout is the end of: all, or those of the decoder alone."""
        first = find_stack_starts(self.values())[-1]
        return Sites(s for s in self.values() if s.layer >= first)

    def pick(self, *ops: Op, layers: slice | Iterable[int] = slice(None)) -> Sites:
        """The sites of some operations and layers.

        Args:
            ops: Operations to keep; none means all.
            layers: A slice over layer numbers counted from 0 (`slice(6, None)` is the upper half
                of twelve), or layer numbers counted from 1.

        Raises:
            NoSitesError: Nothing fits.
        """
        numbers_picked = pick_layers(layers, self.layers)
        picked = [
            s for s in self.values() if (not ops or s.op in ops) and s.layer in numbers_picked
        ]
        if not picked:
            raise NoSitesError(
                "no site fits the selection",
                where=f"ops={list(ops) or 'all'}, layers={sorted(numbers_picked)}",
                found=f"operations here: {sorted({s.op for s in self.values()})}, "
                f"layers 1 to {self.layers}",
                fix="print(host.sites) lists them",
            )
        return Sites(picked)

    @staticmethod
    def declare(layers: Iterable[Layer]) -> Declaration:
        """Declare layers of a backbone whose structure does not show them: `Host(..., sites=...)`.

        ```python
        attention = Branch("att", enter="norm1", projections=Projections.declare(
            q="att.wq", k="att.wk", v="att.wv", out="att.wo", heads=4))
        layers = [Layer(path, mha=attention, ffn=Branch("mlp", "norm2")) for path in paths]
        host = Host(model, x, sites=Sites.declare(layers))
        ```

        Widths, layouts and the readout are measured, other layers are still found, and what is
        declared is held against the host's one forward: modules must be there and run, and
        projections must give what the layer returned. A sum that is seen has the proof "residual",
        one that is only declared "declared". See `docs/own_backbone.md`.

        Args:
            layers: One `Layer` a block, in any order; they are numbered as they run.

        Raises:
            NoSitesError: No layers, or a block twice.
        """
        return Declaration.of(layers)

    def summarise(self) -> str:
        """How many sites there are, by operation and proof, in words."""
        counts = Counter((s.op, s.proof) for s in self.values())
        return ", ".join(f"{n} {op} ({proof})" for (op, proof), n in counts.items())

    def rows(self) -> list[dict[str, Any]]:
        """One row a site, as `restuning sites` prints them."""
        return [
            {
                "name": s.name,
                "op": s.op,
                "width": s.dim,
                "layout": s.layout,
                "reads": s.reads,
                "adds": s.adds,
                "proof": s.proof,
                "projections": bool(s.projections),
            }
            for s in self.values()
        ]

    def __repr__(self) -> str:
        """A table, a line a site."""
        rows = self.rows()
        columns = ["name", "width", "reads", "adds", "proof"]
        table = [columns, *[[str(row[c]) for c in columns] for row in rows]]
        widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in table
        )


def find_stack_starts(sites: Iterable[Site]) -> list[int]:
    """First layers of the stacks: 1, and that of a decoder, every layer of which reads across.

    Elsewhere a layer that reads across stands in the one stack (UNets, gated cross-attention).
    """
    all_sites = list(sites)
    crossing = {s.layer for s in all_sites if s.op == "cross"}
    first_crossing = min(crossing, default=0)
    # A decoder's layers all read across, up to the last.
    all_cross = {s.layer for s in all_sites if s.layer >= first_crossing} <= crossing
    first_layers, container_before = [], None
    for site in (s for s in all_sites if s.op == "block"):
        container = site.module.rpartition(".")[0]
        begins = all_cross and site.layer == first_crossing
        if container_before is None or (container != container_before and begins):
            first_layers.append(site.layer)
        container_before = container
    return first_layers


def is_hierarchy(sites: Iterable[Site]) -> bool:
    """Whether streams are maps, or change their width on the way."""
    blocks = [s for s in sites if s.op == "block"]
    return len({s.dim for s in blocks}) > 1 or any(s.layout != "b n d" for s in blocks)
