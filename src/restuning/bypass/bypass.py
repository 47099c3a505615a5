"""The side network of Res-Tuning-Bypass: taps in, last state out, no gradient towards the taps.

An ordinary `nn.Module` that never sees a host. Its needs follow from its tuners and the readout.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from restuning._errors import TunerShapeError
from restuning._torch import is_transformed
from restuning.bypass import fused
from restuning.bypass.side_network import SideNetwork, side_network
from restuning.bypass.stacked import StackedBypass, pad_rank
from restuning.sites import Needs, Site, Sites, resolve_tokens
from restuning.tuners import Tuner, at_time, in_own_precision, real_tokens

Plan = Callable[[Site], "Tuner | None"]
STARTING_LAMBDA = 0.25
"""Lambda of every layer at the start (`recipes/bypass_start.py`). Of 12 layers the last tap then counts
0.25 and the six before it 0.62 together. Nearer to 1 the vertical path hardly learns; nearer to 0 the last
tap, which linear probing reads alone, is lost among the others."""


@side_network("bypass")
class Bypass(SideNetwork):
    r"""`x_0' = x_0`, `x_l' = lambda_l h_l(x_l) + (1 - lambda_l) v_l(x_{l-1}')`.

    h and v are `x + tuner(x)`; where a plan gives None they are the identity. lambda_l is the
    sigmoid of one learned number a layer.

    Args:
        taps: Names of x_0 ... x_L.
        dims: Their widths.
        horizontal: L tuners (or None each) on the taps x_1 ... x_L.
        vertical: L tuners (or None each) on the states x_0' ... x_{L-1}'.
        residual: Return `x_L + (x_L' - m_L)`, where m is the same recursion without tuners: what
            the tuners changed is added to the backbone's own last stream. With tuners that start
            as no change the backbone's output is then exact at the start, whatever the lambdas.

    Shape:
        taps: mapping of name to `b n d_l` (or `b h w d_l`). Returns the last state, `b n d_L`.

    On maps and hierarchies (readout "own") every tap is one vector: x_l the mean of the stream over
    its grid, x_L the backbone's own feature, and a learned linear map between widths. This is a
    form of its own, not a short cut: mean(h(x)) = h(mean(x)) holds only for affine h.

    Cost: with 24 Res-Adapters of rank 10 on ViT-B/16, 387,312 parameters and 12 lambdas.
    Start: lambda `STARTING_LAMBDA` in every layer (the paper's is not known). With tuners that start as no
    change the state is then a mean of the taps, `sum_l lambda_l prod_{k>l} (1 - lambda_k) x_l` with
    lambda_0 = 1. It is 0.5 where residual, since the backbone's own stream is then added whole, and in a
    last layer whose tap is of another width, since the state comes there through a map drawn at random.
    Reference: arXiv 2310.19859 section 3, Fig. 3(c). The authors' released code has no lambda.
    """

    lambda_names = ("gate",)

    def __init__(
        self,
        taps: Sequence[str],
        dims: Sequence[int],
        horizontal: Sequence[Tuner | None],
        vertical: Sequence[Tuner | None],
        residual: bool = False,
    ) -> None:
        super().__init__()
        self.residual = residual
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
        # The logit of lambda: a step of any size leaves lambda between 0 and 1.
        # A residual bypass adds only what its tuners changed, so no lambda has to weigh the taps.
        start = 0.5 if residual else STARTING_LAMBDA
        self.gate = nn.Parameter(torch.full((layers,), math.log(start / (1 - start))))
        self.resample = nn.ModuleDict(
            {
                str(layer): Resample(dims[layer], dims[layer + 1])
                for layer in range(layers)
                if dims[layer] != dims[layer + 1]
            }
        )
        # The state comes to x_L through a map drawn at random, beside which x_L must be seen.
        if str(layers - 1) in self.resample:
            nn.init.zeros_(self.gate[-1:])

    @classmethod
    def plan(
        cls,
        sites: Sites,
        horizontal: Plan | None,
        vertical: Plan | None,
        *,
        own: int | None = None,
        residual: bool = False,
    ) -> Bypass:
        """A bypass over all block sites (of the decoder in an encoder-decoder).

        Args:
            sites: The host's.
            horizontal: Tuners on the taps; None is the identity.
            vertical: Tuners on the states; None is the identity.
            own: Width of the backbone's own feature where that is x_L (readout "own").
            residual: See the class.
        """
        # Of an encoder-decoder the readout reads the decoder, whose stem comes last.
        start = list(sites.stems)[-1]
        blocks = [s for s in sites.last_stack.values() if s.op == "block"]
        # Plans take sites, so x_0 is described as one: the first block's, as wide as its input.
        states = [replace(blocks[0], dim=blocks[0].dim_in or blocks[0].dim), *blocks]
        if own is not None:
            states[-1] = replace(blocks[-1], dim=own)
        across = [horizontal(s) if horizontal else None for s in states[1:]]
        # A vertical tuner works on the state before the layer, hence on that state's width.
        below = [vertical(s) if vertical else None for s in states[:-1]]
        names, dims = [start, *[s.name for s in blocks]], [s.dim for s in states]
        return cls(names, dims, across, below, residual)

    @property
    def tuners(self) -> list[Tuner]:
        """All tuners: the horizontal ones, then the vertical ones."""
        return [t for t in [*self.horizontal, *self.vertical] if isinstance(t, Tuner)]

    def needs(self, pool: str) -> Needs:
        """What is read: what the readout reads, or all tokens where they are mixed on the way.

        Raises:
            TunerShapeError: A tuner mixes tokens where the readout leaves one vector.
        """
        tokens, mixing = (
            resolve_tokens(pool),
            next((t for t in self.tuners if t.mixes_tokens), None),
        )
        if tokens == "pool" and mixing is not None:
            raise TunerShapeError(
                "a bypass on the backbone's own feature has one vector a tap",
                where=mixing.kind,
                found="a tuner that mixes tokens",
                fix='give the task pool="mean" or "all"',
            )
        # Resampling pools over the grid, so it too needs more than the token that is read.
        token_wise = mixing is None and not len(self.resample)
        return Needs(self.taps, tokens if tokens == "pool" or token_wise else "all")

    def forward(self, taps: Mapping[str, Tensor]) -> Tensor:
        """Compute the last state x_L' (see the class). The taps are detached first."""
        streams = self._read(taps)
        if self.can_fuse(streams):
            return self.run_fused(taps, _keep_parameter)[0]
        # No host runs here: tuners learn of padding and time step from what the taps carry.
        with real_tokens(getattr(taps, "mask", None)), at_time(getattr(taps, "time", None)):
            state = self._run(streams, _add_delta)
        if not self.residual:
            return state
        # The same recursion without tuners is taken off: what lambda mixes of the taps themselves
        # cancels.
        return streams[-1] + (state - self._run(streams, lambda tuner, x: x))

    def _read(self, taps: Mapping[str, Tensor]) -> list[Tensor]:
        return [in_own_precision(self, taps[name].detach()) for name in self.taps]

    def _run(
        self, streams: Sequence[Tensor], beside: Callable[[nn.Module, Tensor], Tensor]
    ) -> Tensor:
        gates, state = self.gate.sigmoid(), streams[0]
        for layer, stream in enumerate(streams[1:]):
            across = beside(self.horizontal[layer], stream)
            below = beside(self.vertical[layer], state)
            if str(layer) in self.resample:
                below = self.resample[str(layer)](below, across)
            else:
                below = pool_to_grid(below, across.shape[1:-1])
            # Written as one interpolation: below + lambda (across - below).
            # Under autocast a map between widths is in half precision, and a stream may be in fp32.
            kind = torch.promote_types(below.dtype, across.dtype)
            state = torch.lerp(below.to(kind), across.to(kind), gates[layer].to(kind))
        return state

    def can_fuse(self, streams: Sequence[Tensor]) -> bool:
        """Whether `run_fused` applies: equal shapes, adapters of a side alike, nothing random or residual.

        A compiler or a functional transform records the bypass as it is written.
        """
        x = streams[0]
        return (
            # Not isinstance: a subclass may compute something else than the products.
            type(self) is Bypass
            and not torch.compiler.is_compiling()
            and not is_transformed()
            # The fused products add in place, and autocast leaves operations in place alone.
            and not torch.is_autocast_enabled(x.device.type)
            and all(s.shape == x.shape and s.dtype == self.gate.dtype for s in streams)
            and not len(self.resample)
            and not self.residual
            and fused.fused_signature(self.horizontal, self.vertical) is not None
        )

    def run_fused(self, taps: Mapping[str, Tensor], of: Callable[[nn.Parameter], Tensor]) -> Tensor:
        """The last states of k bypasses of this form in few products; see `fused.py`.

        Args:
            taps: As for the bypass.
            of: A parameter of this bypass to the k stacked ones, `k ...`, or to itself (k = 1).

        Shape:
            Returns `k b ...`, the rest as the taps.
        """
        streams = self._read(taps)
        form = fused.fused_signature(self.horizontal, self.vertical)
        assert form is not None
        across, below = (
            fused.fold_weights(self.horizontal, of),
            fused.fold_weights(self.vertical, of),
        )
        # `m d`: to token-wise tuners it is one which rows belong to which input.
        flat = [stream.reshape(-1, stream.shape[-1]) for stream in streams]
        state = fused.run(flat, of(self.gate).sigmoid(), across, below, form[2])
        return state.unflatten(1, streams[-1].shape[:-1])

    def stack_key(self) -> str | None:
        """What bypasses that stack have in common; None where one is not made of plain adapters."""
        form = fused.fused_signature(self.horizontal, self.vertical, at_rest=True)
        # As in `can_fuse`: the stack would answer as this class.
        if type(self) is not Bypass or form is None or self.residual or len(set(self.dims)) > 1:
            return None
        # As they are in the stack: ranks 7 and 8 then have one key.
        ranks = [pad_rank(rank) for rank in form[:2]]
        return json.dumps([self.taps, self.dims, *ranks, form[2]])

    @classmethod
    def stack(cls, networks: Sequence[Bypass]) -> StackedBypass:
        """Stack trained bypasses that have the same `stack_key`, for inference."""
        return StackedBypass(networks)

    def spec(self) -> dict[str, Any]:
        """Everything needed to build this bypass again, as JSON."""
        sides = {"horizontal": self.horizontal, "vertical": self.vertical}
        return super().spec() | {name: list_specs(side) for name, side in sides.items()}


def list_specs(side: nn.ModuleList) -> list[dict[str, Any] | None]:
    """The specs of one side's tuners; None for a layer that has none."""
    return [t.spec() if isinstance(t, Tuner) else None for t in side]


def _or_identity(tuner: Tuner | None) -> nn.Module:
    return nn.Identity() if tuner is None else tuner


def _keep_parameter(parameter: Tensor) -> Tensor:
    return parameter


def _add_delta(tuner: nn.Module, x: Tensor) -> Tensor:
    return tuner.added(x, x) if isinstance(tuner, Tuner) else x


RANK = 64
"""Channels between two stages: ResNet-50 would otherwise spend 2.7 million parameters there."""


class Resample(nn.Module):
    """Fits a state to the next stage of a hierarchy: `pool(x) W`, average pooling over the grid.

    Args:
        dim: Width of the state.
        to: Width of the next stage.

    Shape:
        x: `b h w d` or `b n d`; like: the next tap. Returns a tensor of like's shape.

    Cost: W has `dim * to + to` parameters, or, where that is less, goes through 64 channels.
    """

    def __init__(self, dim: int, to: int) -> None:
        super().__init__()
        whole = nn.Linear(dim, to)
        thin = RANK * (dim + to) < dim * to
        self.width: nn.Module = (
            whole
            if not thin
            else nn.Sequential(nn.Linear(dim, RANK, bias=False), nn.Linear(RANK, to))
        )

    def forward(self, x: Tensor, like: Tensor) -> Tensor:
        """Pool the state to the grid of `like`, then map it to that width."""
        return self.width(pool_to_grid(x, like.shape[1:-1]))


def pool_to_grid(x: Tensor, grid: Sequence[int]) -> Tensor:
    """Average pooling of a state to a grid, `b h w d` or `b n d`; itself where it is on it."""
    if tuple(x.shape[1:-1]) == tuple(grid):
        return x
    # Streams are channels-last, torch's pooling is channels-first.
    if x.dim() == 4:
        pooled = F.adaptive_avg_pool2d(x.movedim(-1, 1), (grid[0], grid[1]))
        return pooled.movedim(1, -1)
    side, to = int(x.shape[1] ** 0.5), int(grid[0] ** 0.5)
    # A square number of tokens is taken for a grid, as in hierarchies that flatten theirs.
    if side**2 == x.shape[1] and to**2 == grid[0]:
        return F.adaptive_avg_pool2d(x.mT.unflatten(-1, (side, side)), to).flatten(2).mT
    return F.adaptive_avg_pool1d(x.mT, grid[0]).mT
