"""A Res-Adapter whose bottleneck is scaled and shifted by the time step of a diffusion model."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from restuning._errors import MissingInputError
from restuning.tuners._base import Tuner, tuner
from restuning.tuners.adapter import start_bottleneck
from restuning.tuners.context import read_timestep
from restuning.tuners.products import add_linear
from restuning.tuners.view import FrozenAttention

FEATURES = 64
"""Sines and cosines of a time step: 32 periods from 2 pi to 10,000 times that, as diffusion models
use them, which tell steps of 1 apart and know the whole range of 1,000."""


@tuner("film_adapter")
class FilmAdapter(Tuner):
    r"""A bottleneck that knows the time step: `W_up (phi(W_down x) (1 + a(t)) + b(t))`.

    a and b are linear in sines and cosines of t (FiLM). A tuner reads the stream before the norms,
    in which time is only implied; how much noise there is decides what is worth adding.

    Args:
        dim: Width d of the stream.
        rank: Width r of the bottleneck.
        zero: Start as no change (W_up and its bias zero). a and b start at zero in any case.
        time_scale: What t is multiplied by: 1 where it counts to 1,000, 1,000 where it runs from 0
            to 1 (Flux).

    Shape:
        x: `(b, *n, d) -> (b, *n, d)`.

    Cost: `2*d*r + r + d` parameters as a Res-Adapter, and `130*r` for the time step.
    Start: as `ResAdapter`.
    Reference: not in the paper, whose tuners know no time; Perez et al. 2018 (FiLM).

    Raises:
        MissingInputError: It runs where no time step is known.
    """

    def __init__(
        self, dim: int, *, rank: int = 10, zero: bool = True, time_scale: float = 1.0
    ) -> None:
        super().__init__()
        self.dim, self.rank, self.zero, self.time_scale = dim, rank, zero, float(time_scale)
        self.down = nn.Linear(dim, rank)
        self.up = nn.Linear(rank, dim)
        self.film = nn.Linear(FEATURES, 2 * rank)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the start values; see the class."""
        start_bottleneck(self.down, self.up, self.zero)
        # a = b = 0: a Res-Adapter, until training finds that time matters.
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)

    def forward(self, x: Tensor, view: FrozenAttention | None = None) -> Tensor:
        """Compute the delta; see the class."""
        return self.up(self._compute_hidden(x))

    def scaled(self, x: Tensor, view: FrozenAttention | None, scale: Tensor) -> Tensor:
        """`scale * tuner(x)` with the scale folded into W_up."""
        return F.linear(
            self._compute_hidden(x), self.up.weight * scale.unsqueeze(-1), self.up.bias * scale
        )

    def added(
        self, y: Tensor, x: Tensor, view: FrozenAttention | None = None, scale: Tensor | None = None
    ) -> Tensor:
        """`y + scale * tuner(x)` as one product from the bottleneck."""
        return add_linear(y, self._compute_hidden(x), self.up, scale)

    def _compute_hidden(self, x: Tensor) -> Tensor:
        steps = read_timestep()
        if steps is None:
            raise MissingInputError(
                "this tuner needs the time step of a diffusion model",
                where=self.kind,
                found="a forward without one",
                fix="use ResAdapter on backbones without time steps",
            )
        # As wide as the stream's rows, or one step for all of them.
        weight = self.film.weight
        features = encode_time(steps.to(weight.device) * self.time_scale)
        film = self.film(features.to(weight.dtype))
        # `b 2r` to `b 1 .. 1 2r`, over all tokens of a sample.
        film = film.reshape(film.shape[0], *[1] * (x.dim() - 2), film.shape[1])
        scale, shift = film.chunk(2, -1)
        return torch.addcmul(shift, F.gelu(self.down(x)), 1 + scale)


def encode_time(steps: Tensor) -> Tensor:
    """Sines and cosines of time steps, `b -> b 64`."""
    half = FEATURES // 2
    exponents = torch.arange(half, device=steps.device, dtype=torch.float32) / (half - 1)
    # In fp32: bf16 does not tell 999 from 1,000.
    angles = steps.float()[:, None] * torch.exp(-math.log(10_000) * exponents)
    return torch.cat([angles.sin(), angles.cos()], 1)
