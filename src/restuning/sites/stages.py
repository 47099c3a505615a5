"""Stages of a network without residual sums (VGG, DenseNet, Inception): where its grid changes.

A stage ends at the last *cut* before the grid changes. A cut is a module whose output is what the
next module reads, while nothing that runs later reads anything older: from there on the network is
a function of that one tensor. The first stage is the embedding, `block.0`; the others are sites.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from restuning.sites.find_readout import has_unit_length, read_vector
from restuning.sites.readout import Readout
from restuning.sites.site import Site, Sites
from restuning.sites.sums import ModuleCall, find_layout, first_tensor

Digest = tuple[tuple[int, ...], bytes]


@dataclass(eq=False, slots=True)
class _RecordedCall:
    """One call, its tensors as digests: a whole network's streams are not kept."""

    path: str
    start: int
    input: Digest | None
    end: int = -1
    output: Digest | None = None
    sample: Tensor | None = None


class StageFinder:
    """Listens to one forward (`enter`, `leave` of every module) and says where its stages end."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.clock = 0
        self.stack: list[_RecordedCall] = []
        self.calls: list[_RecordedCall] = []

    def enter(self, path: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """A module is about to run."""
        self.clock += 1
        x = first_tensor(args)
        x = first_tensor(kwargs) if x is None else x
        self.stack.append(_RecordedCall(path, self.clock, _digest(x)))

    def leave(self, path: str, output: Any) -> None:
        """A module has returned."""
        self.clock += 1
        call = self.stack.pop()
        y = first_tensor(output)
        call.end, call.output = self.clock, _digest(y)
        if y is not None and y.dim() == 4:
            call.sample = y.detach()
        self.calls.append(call)

    def conclude(self, output: Any) -> tuple[Sites, Readout] | None:
        """Stages after the first, and the backbone's own vector as readout; None without either."""
        own = read_vector(output)
        ends = self._find_ends()
        # The first end is the embedding; a stage needs one more.
        if own is None or len(ends) < 2:
            return None
        sites = [
            self._make_site(number, before, end)
            for number, (before, end) in enumerate(zip(ends[:-1], ends[1:], strict=True), 1)
        ]
        return Sites(sites), Readout(
            "", "own", own.shape[-1], proof="exact", unit=has_unit_length(own)
        )

    def _find_ends(self) -> list[tuple[_RecordedCall, _RecordedCall]]:
        """Last cut of every grid, with the module that reads it."""
        by_start = sorted(self.calls, key=lambda c: c.start)
        times = [c.path for c in self.calls]
        # A hook cannot tell the calls of a shared module (an activation) apart here.
        once = {path for path in times if times.count(path) == 1}
        ends: dict[tuple[int, ...], tuple[_RecordedCall, _RecordedCall]] = {}
        for call in sorted(self.calls, key=lambda c: (c.end, -c.start)):
            if call.path not in once or call.output is None or call.sample is None or not call.path:
                continue
            grid = call.output[0][2:]
            # Pooled to one place: no grid is left.
            if set(grid) == {1}:
                continue
            reader = next((c for c in by_start if c.start > call.end and c.path in once), None)
            if reader is None or reader.input != call.output or not self._is_cut(call):
                continue
            # In the order of the forward: the last cut of a grid stays.
            ends[grid] = (call, reader)
        return list(ends.values())

    def _is_cut(self, call: _RecordedCall) -> bool:
        older = {d for c in self.calls if c.start <= call.end for d in (c.input,)}
        older |= {c.output for c in self.calls if c.end < call.end}
        # Equal values are one stream, whoever made them (an identity, dropout).
        older -= {call.output, None}
        return not any(c.start > call.end and c.input in older for c in self.calls)

    def _make_site(
        self,
        number: int,
        before: tuple[_RecordedCall, _RecordedCall],
        end: tuple[_RecordedCall, _RecordedCall],
    ) -> Site:
        last, reader = end
        assert last.sample is not None
        # Both who read the end and who made streams of its shape have a say in its layout.
        calls = [
            ModuleCall(c.path, self.model.get_submodule(c.path), c.start, last.sample)
            for c in (reader, *self.calls)
            if c.input == last.output
        ]
        calls += [
            ModuleCall(c.path, self.model.get_submodule(c.path), c.start, None, output=c.sample)
            for c in self.calls
            if c.sample is not None and c.sample.shape == last.sample.shape
        ]
        layout, dim = find_layout(last.sample, self.model.get_submodule(last.path), calls)
        assert before[0].sample is not None
        # Streams of one network are laid out alike.
        dim_in = before[0].sample.shape[1 if layout == "b d h w" else -1]
        return Site(
            f"block.{number}",
            "block",
            number,
            dim,
            before[1].path,
            last.path,
            last.path,
            layout=layout,
            changes=True,
            dim_in=dim_in,
        )


def _digest(x: Any) -> Digest | None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return None
    raw = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return tuple(x.shape), hashlib.blake2b(raw.numpy().tobytes(), digest_size=16).digest()


def vary_example(value: Any) -> Any:
    """An example whose values differ: a constant image would let wrong sums pass as right."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() < 2:
        return value
    if bool((value == value.flatten()[0]).all()):
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
        return noise.to(value)
    return value


@dataclass(frozen=True)
class StageOutput:
    """What a module that may be a stage returned.

    Attributes:
        path: Path of the module.
        map: Its first output, `b d h w`.
    """

    path: str
    map: Tensor


def list_stage_paths(model: nn.Module) -> set[str]:
    """Children of the model, and members of its lists."""
    paths: set[str] = set()
    for name, child in model.named_children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            paths |= {f"{name}.{member}" for member, _ in child.named_children()}
        else:
            paths.add(name)
    return paths


def find_decoder_stages(outputs: list[StageOutput], layers: list[Site]) -> list[Site]:
    """The stages as sites; none where no grid grows.

    Args:
        outputs: What the modules that may be stages returned, in the order of the forward.
        layers: Block sites, numbered.
    """
    inside = {
        stage.path: [s for s in layers if s.module.startswith(f"{stage.path}.")]
        for stage in outputs
    }
    stages = [stage for stage in outputs if inside[stage.path] and stage.map.dim() == 4]
    sizes = [stage.map.shape[-2] * stage.map.shape[-1] for stage in stages]
    # A decoder ends on a larger grid than it began on.
    if len(stages) < 3 or sizes[-1] == min(sizes):
        return []
    # The last of the smallest: the middle of a UNet, after which the grid grows.
    bottom = len(sizes) - 1 - sizes[::-1].index(min(sizes))
    return [
        Site(
            f"stage.{number}",
            "stage",
            inside[stage.path][-1].layer,
            stage.map.shape[1],
            stage.path,
            stage.path,
            stage.path,
            layout="b d h w",
            changes=True,
            proof="shape",
        )
        for number, stage in enumerate(stages[bottom:], 1)
    ]
