"""Tuners made of tuners."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from restuning._errors import TunerShapeError
from restuning.tuners._base import Tuner, tuner
from restuning.tuners.view import FrozenAttention
from restuning.tuners.wrapper import Wrapper


@tuner("sum")
class Sum(Wrapper):
    """Several tuners at one site: `sum_i tuner_i(x)`.

    Args:
        tuners: Two or more tuners of one width that read the same place.

    Raises:
        TunerShapeError: None given, or widths or reading places differ.
    """

    def __init__(self, *tuners: Tuner) -> None:
        if not tuners or len({(t.dim, t.dim_out, t.reads) for t in tuners}) != 1:
            raise TunerShapeError(
                "a sum needs tuners of one width that read the same place",
                found=", ".join(f"{t.kind}: d={t.dim}, reads {t.reads}" for t in tuners) or "none",
                fix="put them at sites of their own",
            )
        super().__init__(tuners[0])
        self.tuners = nn.ModuleList(tuners)

    @property
    def members(self) -> list[Tuner]:
        """The tuners that are added up."""
        return [each for each in self.tuners if isinstance(each, Tuner)]

    def forward(self, x: Tensor, view: FrozenAttention | None = None) -> Tensor:
        """Compute the sum of the deltas."""
        first, *others = self.members
        total = first(x, view)
        for each in others:
            total = total + each(x, view)
        return total

    def added(
        self, y: Tensor, x: Tensor, view: FrozenAttention | None = None, scale: Tensor | None = None
    ) -> Tensor:
        """`y + scale * sum_i tuner_i(x)`, one tuner after the other."""
        for each in self.members:
            y = each.added(y, x, view, scale)
        return y


@tuner("drop_path")
class DropPath(Wrapper):
    """A tuner whose delta is left out for a sample with probability p while training.

    `delta * m / (1 - p)`, m ~ Bernoulli(1 - p) per sample; at inference the tuner itself.

    Args:
        tuner: What is dropped.
        p: Probability of leaving out; 0.1 is the usual value in the Adapter+ recipe.
    """

    def __init__(self, tuner: Tuner, p: float = 0.1) -> None:
        super().__init__(tuner)
        self.tuner, self.p = tuner, p

    @property
    def members(self) -> tuple[Tuner]:
        """The tuner inside."""
        return (self.tuner,)

    def forward(self, x: Tensor, view: FrozenAttention | None = None) -> Tensor:
        """Compute the delta, dropped for some samples while training."""
        delta = self.tuner(x, view)
        if not self.training or self.p == 0:
            return delta
        # One draw a sample, whatever the number of axes; divided by 1 - p the mean stays the same.
        keep = torch.rand(delta.shape[0], *[1] * (delta.dim() - 1), device=delta.device) >= self.p
        return delta * (keep / (1 - self.p)).to(delta.dtype)

    def added(
        self, y: Tensor, x: Tensor, view: FrozenAttention | None = None, scale: Tensor | None = None
    ) -> Tensor:
        """`y + scale * tuner(x)`; while training with the dropped delta."""
        # A dropped delta must be made apart; without dropping it goes into the inner product.
        if self.training and self.p > 0:
            return super().added(y, x, view, scale)
        return self.tuner.added(y, x, view, scale)
