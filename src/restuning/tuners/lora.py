"""LoRA: a product of two narrow maps beside a linear map, or beside a convolution."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from restuning._errors import TunerShapeError
from restuning.tuners._base import Tuner, tuner
from restuning.tuners.products import add_product
from restuning.tuners.view import FrozenAttention


class LowRank(Tuner):
    """What both forms share: rank, alpha and start, and a scale that goes into the last map; abstract.

    Args:
        dim: Channels that the map reads.
        out: Channels that it returns; None for as many.
        rank: Width r between the two maps.
        alpha: s is alpha / r; None for r, which makes s 1.
        rslora: s is alpha over the root of r, so that a high rank learns at the rate of a low one.
        dropout: Chance to leave out each number of what is read, while training.
        zero: Start as no change.
    """

    a: nn.Module
    b: nn.Module

    def __init__(
        self,
        dim: int,
        out: int | None,
        rank: int,
        alpha: float | None,
        rslora: bool,
        dropout: float,
        zero: bool,
    ) -> None:
        super().__init__()
        self.dim, self.out, self.rank = dim, out, rank
        self.alpha = float(rank if alpha is None else alpha)
        self.rslora, self.dropout, self.zero = rslora, float(dropout), zero

    @property
    def dim_out(self) -> int:
        """Width of the delta."""
        return self.dim if self.out is None else self.out

    @property
    def factor(self) -> float:
        """The constant s."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def reset_parameters(self) -> None:
        """A as torch draws a map of its shape, B zeros, or drawn likewise where it does not start as no change."""
        nn.init.kaiming_uniform_(_weight(self.a), a=math.sqrt(5))
        if self.zero:
            nn.init.zeros_(_weight(self.b))
        else:
            nn.init.kaiming_uniform_(_weight(self.b), a=math.sqrt(5))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def _scaled_b(self, scale: Tensor | None) -> Tensor:
        """B with all scales in it: the delta, which is large, is never multiplied."""
        weight = _weight(self.b)
        if scale is not None:
            return weight * (scale * self.factor).view(-1, *[1] * (weight.dim() - 1))
        return weight if self.factor == 1.0 else weight * self.factor


@tuner("lora")
class Lora(LowRank):
    r"""Two narrow maps beside a linear one: `W x + s B A x`, s = alpha / r.

    Args:
        dim: Channels d that the map reads.
        out: Channels that it returns; None for d.
        rank: Width r between A and B. 8 is PEFT's default.
        alpha: See s; None for r, which makes s 1.
        rslora: s = alpha over the root of r (Kalajdzievski 2023, arXiv 2312.03732).
        dropout: Chance to leave out each number of x, while training.
        zero: Start as no change (B zeros), as published; False draws B as A.

    Shape:
        x: `(*b, n, d) -> (*b, n, out)`.

    Cost: `r*(d + out)` parameters, `2*r*(d + out)` flops a token. The delta is not made by itself: one
        product begins from `W x`.
    Start: A Kaiming-uniform, as a linear map of torch; B zeros.
    Reference: Hu et al. 2021, arXiv 2106.09685; A and B are `lora_A` and `lora_B` of PEFT.
    """

    def __init__(
        self,
        dim: int,
        out: int | None = None,
        *,
        rank: int = 8,
        alpha: float | None = None,
        rslora: bool = False,
        dropout: float = 0.0,
        zero: bool = True,
    ) -> None:
        super().__init__(dim, out, rank, alpha, rslora, dropout, zero)
        self.a = nn.Linear(dim, rank, bias=False)
        self.b = nn.Linear(rank, self.dim_out, bias=False)
        self.reset_parameters()

    def forward(self, x: Tensor, view: FrozenAttention | None = None) -> Tensor:
        """Compute the delta; see the class."""
        return F.linear(self._compute_hidden(x), self._scaled_b(None))

    def scaled(self, x: Tensor, view: FrozenAttention | None, scale: Tensor) -> Tensor:
        """`scale * tuner(x)` with the scale folded into B."""
        return F.linear(self._compute_hidden(x), self._scaled_b(scale))

    def added(
        self, y: Tensor, x: Tensor, view: FrozenAttention | None = None, scale: Tensor | None = None
    ) -> Tensor:
        """`y + scale * tuner(x)` as one product."""
        if y.shape[-1] != self.dim_out:
            raise TunerShapeError(
                "a tuner would change the shape of what it is added to",
                where=self.kind,
                found=f"it gives {self.dim_out} channels, there are {y.shape[-1]}",
                fix="give out= the width of what the map returns",
            )
        return add_product(y, self._compute_hidden(x), self._scaled_b(scale), None)

    def _compute_hidden(self, x: Tensor) -> Tensor:
        return F.linear(self._drop(x), _weight(self.a))


_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_KINDS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@tuner("conv_lora")
class ConvLora(LowRank):
    r"""Two narrow convolutions beside one: `W * x + s B * (A * x)`; A has its kernel, B a kernel of one.

    Args:
        dim: Channels d that the convolution reads.
        out: Channels that it returns; None for d.
        kernel: Its kernel, a number an axis: one, two or three of them.
        stride: Its stride, likewise; None for ones.
        padding: Its padding, likewise, or "same" or "valid"; None for zeros.
        groups: Groups of its channels, which B has as well (as in PEFT, A has none).
        rank: Channels r between A and B, a multiple of the groups.
        alpha: s = alpha / r; None for r, which makes s 1.
        rslora: s = alpha over the root of r.
        dropout: Chance to leave out each number of x, while training.
        zero: Start as no change (B zeros), as published; False draws B as A.

    Shape:
        x: `(*b, *grid, d) -> (*b, *grid', out)`, channels last as everywhere.

    Cost: `r*(d*k + out/groups)` parameters, k the places of the kernel.
    Start: as `Lora`.
    Reference: PEFT's LoRA on convolutions, with equal weights.

    Raises:
        TunerShapeError: The rank is no multiple of the groups, or the kernel has no axis or more than three.
    """

    mixes_tokens = True
    needs_grid = True

    def __init__(
        self,
        dim: int,
        out: int | None = None,
        *,
        kernel: Sequence[int],
        stride: Sequence[int] | None = None,
        padding: Sequence[int] | str | None = None,
        groups: int = 1,
        rank: int = 8,
        alpha: float | None = None,
        rslora: bool = False,
        dropout: float = 0.0,
        zero: bool = True,
    ) -> None:
        super().__init__(dim, out, rank, alpha, rslora, dropout, zero)
        axes = len(kernel)
        if axes not in _KINDS or rank % groups:
            raise TunerShapeError(
                "no LoRA of this shape stands beside a convolution",
                found=f"kernel {list(kernel)}, rank {rank}, {groups} groups",
                fix="give a kernel of one to three axes and a rank that is a multiple of the groups, or leave "
                "convolutions of several groups out (targets=conv)",
            )
        self.kernel, self.groups = list(kernel), groups
        self.stride = [1] * axes if stride is None else list(stride)
        wide = [0] * axes if padding is None else padding
        self.padding = wide if isinstance(wide, str) else list(wide)
        conv, pad = _KINDS[axes], self._pad
        self.a = conv(dim, rank, tuple(self.kernel), tuple(self.stride), pad, bias=False)
        self.b = conv(rank, self.dim_out, (1,) * axes, groups=groups, bias=False)
        self.reset_parameters()

    @property
    def _pad(self) -> tuple[int, ...] | str:
        return self.padding if isinstance(self.padding, str) else tuple(self.padding)

    def forward(self, x: Tensor, view: FrozenAttention | None = None) -> Tensor:
        """Compute the delta; see the class."""
        return self._convolve(x, None)

    def scaled(self, x: Tensor, view: FrozenAttention | None, scale: Tensor) -> Tensor:
        """`scale * tuner(x)` with the scale folded into B."""
        return self._convolve(x, scale)

    def _convolve(self, x: Tensor, scale: Tensor | None) -> Tensor:
        axes = len(self.kernel)
        convolve = _CONVOLVE[axes]
        lead = x.shape[: x.dim() - axes - 1]
        # Channels before the grid: where the backbone has them there, a view.
        inside = self._drop(x).reshape(-1, *x.shape[len(lead) :]).movedim(-1, 1)
        hidden = convolve(inside, _weight(self.a), None, tuple(self.stride), self._pad)
        delta = convolve(hidden, self._scaled_b(scale), None, groups=self.groups).movedim(1, -1)
        return delta.reshape(*lead, *delta.shape[1:])


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight
