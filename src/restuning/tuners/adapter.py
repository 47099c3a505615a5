"""Res-Adapter: a bottleneck beside an operation."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from restuning._errors import UnknownNameError
from restuning.tuners._base import Reads, Tuner, tuner
from restuning.tuners.products import add_product
from restuning.tuners.view import FrozenAttention

BIAS_STD = 1e-6
"""Standard deviation of the biases, as in the authors' code."""

_ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


def start_bottleneck(down: nn.Linear, up: nn.Linear, zero: bool) -> None:
    """Draw a bottleneck as the authors' code does; with `zero` it starts as no change."""
    for layer in (down, up):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.normal_(layer.bias, std=BIAS_STD)
    if zero:
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)


@tuner("res_adapter")
class ResAdapter(Tuner):
    r"""A bottleneck that runs beside an operation: `OP(x) + s * W_up phi(W_down x)`.

    Args:
        dim: Width d of the stream.
        rank: Width r of the bottleneck. The paper uses 10 in every layer.
        activation: phi: "gelu" (the paper), "relu" (AdaptFormer) or "silu".
        reads: "stream" (paper, Fig. 3b: before the norm) or "output" (OP's output: the embedded,
            sequential adapter with an inner skip, which is then exact).
        zero: Start as no change (W_up and its bias zero). The authors' classification code does
            not, so the default is False.
        factor: Constant s. 1 in the paper; AdaptFormer uses 0.1.

    Shape:
        x: `(*b, n, d) -> (*b, n, d)`.

    Cost: `2*d*r + r + d` parameters, `4*d*r` flops a token.
    Start: Xavier-uniform weights, biases N(0, 1e-6), as in the authors' code.
    Reference: Jiang et al. 2023, arXiv 2310.19859, Fig. 3(a).
    Departs: fed with OP's input as drawn; the text derives it fed with OP's output. They are not
    equal; `reads="output"` is the latter.
    """

    def __init__(
        self,
        dim: int,
        *,
        rank: int = 10,
        activation: str = "gelu",
        reads: Reads = "stream",
        zero: bool = False,
        factor: float = 1.0,
    ) -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise UnknownNameError(
                "no such activation", where=activation, fix=f"one of {', '.join(_ACTIVATIONS)}"
            )
        self.dim, self.rank, self.activation, self.zero = dim, rank, activation, zero
        self.reads: Reads = reads
        self.factor = factor
        self.down = nn.Linear(dim, rank)
        self.up = nn.Linear(rank, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the start values; see the class."""
        start_bottleneck(self.down, self.up, self.zero)

    def forward(self, x: Tensor, view: FrozenAttention | None = None) -> Tensor:
        """Compute the delta; see the class."""
        delta = self.up(self._compute_hidden(x))
        # One pass over the stream less where there is nothing to multiply.
        return delta if self.factor == 1.0 else delta * self.factor

    def scaled(self, x: Tensor, view: FrozenAttention | None, scale: Tensor) -> Tensor:
        """`scale * tuner(x)` with a scalar or channel scale folded into W_up."""
        return F.linear(self._compute_hidden(x), *self._fold_scale(scale))

    def added(
        self, y: Tensor, x: Tensor, view: FrozenAttention | None = None, scale: Tensor | None = None
    ) -> Tensor:
        """`y + scale * tuner(x)` as one product from the bottleneck."""
        return add_product(y, self._compute_hidden(x), *self._fold_scale(scale))

    def _compute_hidden(self, x: Tensor) -> Tensor:
        return _ACTIVATIONS[self.activation](self.down(x))

    def _fold_scale(self, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """W_up and its bias with all scales folded in."""
        if scale is None and self.factor == 1.0:
            return self.up.weight, self.up.bias
        if scale is None:
            return self.up.weight * self.factor, self.up.bias * self.factor
        # Two small tensors are scaled; the stream-sized delta is not touched.
        scale = scale * self.factor
        return self.up.weight * scale.unsqueeze(-1), self.up.bias * scale
