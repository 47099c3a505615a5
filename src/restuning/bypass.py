"""The side network of Res-Tuning-Bypass: taps in, last state out, no gradient towards the taps.

An ordinary `nn.Module` that never sees a host. What it reads of the taps (its needs) is derived
from its tuners and the readout, so that nothing else has to be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from restuning import fused
from restuning._errors import TunerShapeError
from restuning.sites import Site, Sites
from restuning.tuners import Tuner, from_spec

Plan = Callable[[Site], "Tuner | None"]
Tokens = Literal["cls", "all"]

LAST_GATE = 3.0
"""Start of the last lambda's logit: sigmoid(3) = 0.95, close to the linear probe (lambda_L = 1)
with a gradient left for the vertical path."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What a task reads of the backbone: which taps, and which tokens of them.

    Attributes:
        taps: `block.0` ... `block.L`.
        tokens: "cls" (the class token only) or "all".
    """

    taps: tuple[str, ...]
    tokens: Tokens = "all"


class Features(dict[str, Tensor]):
    """Taps of one forward by name, with the frozen readout on loan.

    Attributes:
        readout: Final norm and pooling, `(state, pool) -> feature`.
    """

    def __init__(self, taps: Mapping[str, Tensor], readout: Callable[..., Tensor]) -> None:
        super().__init__(taps)
        self.readout = readout


def readout_of(taps: Mapping[str, Tensor], given: Callable[..., Tensor] | None) -> Any:
    """The readout that was given, else the one that came with the features.

    Raises:
        TunerShapeError: Neither.
    """
    if given is not None:
        return given
    if isinstance(taps, Features):
        return taps.readout
    raise TunerShapeError(
        "a task needs the backbone's readout",
        found="plain taps without one",
        fix="pass host.features(...) itself, or give host.readout as the second argument",
    )


class Resample(nn.Module):
    """Fits a state to the next stage of a hierarchy: `pool(x) W`, average pooling over the grid.

    Shape:
        x: `b h w d` or `b n d`; like: the next tap. Returns a tensor of like's shape.
    """

    def __init__(self, dim: int, to: int) -> None:
        super().__init__()
        self.width = nn.Linear(dim, to)

    def forward(self, x: Tensor, like: Tensor) -> Tensor:
        """Pool tokens to like's grid, then map the width."""
        if x.shape[1:-1] != like.shape[1:-1]:
            if x.dim() == 4:
                pooled = F.adaptive_avg_pool2d(x.movedim(-1, 1), (like.shape[1], like.shape[2]))
                x = pooled.movedim(1, -1)
            else:
                side, to = int(x.shape[1] ** 0.5), int(like.shape[1] ** 0.5)
                if side**2 == x.shape[1] and to**2 == like.shape[1]:
                    grid = x.mT.unflatten(-1, (side, side))
                    x = F.adaptive_avg_pool2d(grid, to).flatten(2).mT
                else:
                    x = F.adaptive_avg_pool1d(x.mT, like.shape[1]).mT
        return self.width(x)


class Bypass(nn.Module):
    r"""`x_0' = x_0`, `x_l' = lambda_l h_l(x_l) + (1 - lambda_l) v_l(x_{l-1}')`.

    h and v are `x + tuner(x)`; where a plan gives None they are the identity. lambda_l is the
    sigmoid of one learned number a layer.

    Args:
        taps: Names of x_0 ... x_L.
        dims: Their widths.
        horizontal: L tuners (or None each) on the taps x_1 ... x_L.
        vertical: L tuners (or None each) on the states x_0' ... x_{L-1}'.

    Shape:
        taps: mapping of name to `b n d_l`. Returns the last state, `b n d_L`.

    Cost: with 24 Res-Adapters of rank 10 on ViT-B/16, 387,312 parameters and 12 lambdas.
    Start: lambda 0.5 as a neutral choice (the paper's is not known), the last one 0.95; with
    tuners that start as no change this is linear probing to within 5 % of the vertical state.
    Reference: arXiv 2310.19859 section 3, Fig. 3(c). The authors' released code has no lambda.
    """

    def __init__(
        self,
        taps: Sequence[str],
        dims: Sequence[int],
        horizontal: Sequence[Tuner | None],
        vertical: Sequence[Tuner | None],
    ) -> None:
        super().__init__()
        layers = len(taps) - 1
        if not layers == len(dims) - 1 == len(horizontal) == len(vertical):
            raise TunerShapeError(
                "a bypass needs L+1 taps and widths, and L horizontal and vertical tuners",
                found=f"{len(taps)} taps, {len(dims)} widths, {len(horizontal)} and "
                f"{len(vertical)} tuners",
                fix="give None where a layer has no tuner",
            )
        self.taps, self.dims = tuple(taps), tuple(dims)
        self.horizontal = nn.ModuleList(_or_identity(t) for t in horizontal)
        self.vertical = nn.ModuleList(_or_identity(t) for t in vertical)
        self.gate = nn.Parameter(torch.zeros(layers))
        self.resample = nn.ModuleDict(
            {
                str(layer): Resample(dims[layer], dims[layer + 1])
                for layer in range(layers)
                if dims[layer] != dims[layer + 1]
            }
        )
        with torch.no_grad():
            self.gate[-1] = LAST_GATE

    @classmethod
    def plan(cls, sites: Sites, horizontal: Plan | None, vertical: Plan | None) -> Bypass:
        """A bypass over all block sites, its tuners given by plans (None: the identity)."""
        blocks = [s for s in sites.values() if s.op == "block"]
        dims = [blocks[0].dim, *[s.dim for s in blocks]]
        across = [horizontal(s) if horizontal else None for s in blocks]
        # A vertical tuner works on the state before the layer, hence on that state's width.
        below = [vertical(blocks[max(i - 1, 0)]) if vertical else None for i in range(len(blocks))]
        return cls(["block.0", *[s.name for s in blocks]], dims, across, below)

    @property
    def tuners(self) -> list[Tuner]:
        """All tuners, horizontal first."""
        return [t for t in [*self.horizontal, *self.vertical] if isinstance(t, Tuner)]

    def needs(self, pool: str) -> Needs:
        """What is read: the class token alone if no tuner mixes tokens and pool is "cls"."""
        token_wise = not any(t.mixes_tokens for t in self.tuners) and not len(self.resample)
        return Needs(self.taps, "cls" if pool == "cls" and token_wise else "all")

    def forward(self, taps: Mapping[str, Tensor]) -> Tensor:
        """Run the side network; see the class. Taps are detached at this door."""
        streams = [taps[name].detach() for name in self.taps]
        if self.fuses(streams):
            return self.fused(taps, _itself)[0]
        gates, state = self.gate.sigmoid(), streams[0]
        for layer, stream in enumerate(streams[1:]):
            across = _beside(self.horizontal[layer], stream)
            below = _beside(self.vertical[layer], state)
            if str(layer) in self.resample:
                below = self.resample[str(layer)](below, across)
            elif below.shape != across.shape:
                below = Resample.forward(_SAME_WIDTH, below, across)
            # Written as one interpolation: below + lambda (across - below).
            state = torch.lerp(below, across, gates[layer].to(across.dtype))
        return state

    def fuses(self, streams: Sequence[Tensor]) -> bool:
        """Whether `fused` applies: equal widths, a side's adapters all alike, nothing random.

        A compiler or a functional transform records the bypass as it is written.
        """
        x = streams[0]
        return (
            not torch.compiler.is_compiling()
            and not torch._C._are_functorch_transforms_active()
            and not torch.is_autocast_enabled(x.device.type)
            and all(s.shape == x.shape and s.dtype == self.gate.dtype for s in streams)
            and not len(self.resample)
            and fused.form(self.horizontal, self.vertical) is not None
        )

    def fused(self, taps: Mapping[str, Tensor], of: Callable[[nn.Parameter], Tensor]) -> Tensor:
        """The last states of k bypasses of this form in few products; see `fused.py`.

        Args:
            taps: As for the bypass.
            of: A parameter of this bypass to the k stacked ones, `k ...`, or to itself (k = 1).

        Shape:
            Returns `k b ...`, the rest as the taps.
        """
        streams = [taps[name].detach() for name in self.taps]
        form = fused.form(self.horizontal, self.vertical)
        assert form is not None
        across, below = fused.weights(self.horizontal, of), fused.weights(self.vertical, of)
        flat = [stream.reshape(-1, stream.shape[-1]) for stream in streams]
        state = fused.run(flat, of(self.gate).sigmoid(), across, below, form[2])
        return state.unflatten(1, streams[-1].shape[:-1])

    def spec(self) -> dict[str, Any]:
        """Everything needed to build this bypass again, as JSON."""
        return {
            "taps": list(self.taps),
            "dims": list(self.dims),
            "horizontal": [t.spec() if isinstance(t, Tuner) else None for t in self.horizontal],
            "vertical": [t.spec() if isinstance(t, Tuner) else None for t in self.vertical],
        }

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Bypass:
        """Build a bypass from its `spec`."""
        across, below = (
            [from_spec(s) if s is not None else None for s in spec[side]]
            for side in ("horizontal", "vertical")
        )
        return cls(spec["taps"], spec["dims"], across, below)


class _SameWidth:
    """A resampling of the grid alone, where the width stays."""

    @staticmethod
    def width(x: Tensor) -> Tensor:
        return x


_SAME_WIDTH: Any = _SameWidth()


def _or_identity(tuner: Tuner | None) -> nn.Module:
    return nn.Identity() if tuner is None else tuner


def _itself(parameter: Tensor) -> Tensor:
    return parameter


def _beside(tuner: nn.Module, x: Tensor) -> Tensor:
    return tuner.added(x, x) if isinstance(tuner, Tuner) else x
