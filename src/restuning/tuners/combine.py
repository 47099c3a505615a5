"""Tuners made of tuners."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from restuning._errors import TunerShapeError
from restuning.tuners._base import Tuner, tuner
from restuning.tuners.view import FrozenAttention


@tuner("sum")
class Sum(Tuner):
    """Several tuners at one site: `sum_i tuner_i(x)`.

    Args:
        tuners: Two or more tuners of one width that read the same place.

    Raises:
        TunerShapeError: None given, or widths or reading places differ.
    """

    def __init__(self, *tuners: Tuner) -> None:
        super().__init__()
        if not tuners or len({(t.dim, t.reads) for t in tuners}) != 1:
            raise TunerShapeError(
                "a sum needs tuners of one width that read the same place",
                found=", ".join(f"{t.kind}: d={t.dim}, reads {t.reads}" for t in tuners) or "none",
                fix="put them at sites of their own",
            )
        self.tuners = nn.ModuleList(tuners)
        self.dim, self.reads = tuners[0].dim, tuners[0].reads

    @property
    def mixes_tokens(self) -> bool:  # type: ignore[override]
        """If any of them does."""
        return any(t.mixes_tokens for t in self.tuners)  # type: ignore[union-attr]

    @property
    def looks_ahead(self) -> bool:
        """As any of them."""
        return any(t.looks_ahead for t in self.tuners)  # type: ignore[union-attr]

    @property
    def needs_view(self) -> bool:  # type: ignore[override]
        """If any of them does."""
        return any(t.needs_view for t in self.tuners)  # type: ignore[union-attr]

    @property
    def needs_grid(self) -> bool:  # type: ignore[override]
        """If any of them does."""
        return any(t.needs_grid for t in self.tuners)  # type: ignore[union-attr]

    def reset_parameters(self) -> None:
        """Each tuner's own start."""
        for each in self.tuners:
            each.reset_parameters()  # type: ignore[operator]

    def forward(self, x: Tensor, view: FrozenAttention | None = None) -> Tensor:
        """Compute the sum of the deltas."""
        total = self.tuners[0](x, view)
        for each in list(self.tuners)[1:]:
            total = total + each(x, view)
        return total

    def added(
        self, y: Tensor, x: Tensor, view: FrozenAttention | None = None, scale: Tensor | None = None
    ) -> Tensor:
        """`y + scale * sum_i tuner_i(x)`, one tuner after the other."""
        for each in self.tuners:
            y = each.added(y, x, view, scale)  # type: ignore[operator]
        return y


@tuner("drop_path")
class DropPath(Tuner):
    """A tuner whose delta is left out for a sample with probability p while training.

    `delta * m / (1 - p)`, m ~ Bernoulli(1 - p) per sample; at inference the tuner itself.

    Args:
        tuner: What is dropped.
        p: Probability of leaving out; 0.1 is the usual value in the Adapter+ recipe.
    """

    def __init__(self, tuner: Tuner, p: float = 0.1) -> None:
        super().__init__()
        self.tuner, self.p, self.dim, self.reads = tuner, p, tuner.dim, tuner.reads

    @property
    def mixes_tokens(self) -> bool:  # type: ignore[override]
        """As the tuner inside."""
        return self.tuner.mixes_tokens

    @property
    def looks_ahead(self) -> bool:
        """As the tuner inside."""
        return self.tuner.looks_ahead

    @property
    def needs_view(self) -> bool:  # type: ignore[override]
        """As the tuner inside."""
        return self.tuner.needs_view

    @property
    def needs_grid(self) -> bool:  # type: ignore[override]
        """As the tuner inside."""
        return self.tuner.needs_grid

    def reset_parameters(self) -> None:
        """The tuner's own start."""
        self.tuner.reset_parameters()

    def forward(self, x: Tensor, view: FrozenAttention | None = None) -> Tensor:
        """Compute the delta, dropped for some samples while training."""
        delta = self.tuner(x, view)
        if not self.training or self.p == 0:
            return delta
        kept = torch.rand(delta.shape[0], *[1] * (delta.dim() - 1), device=delta.device) >= self.p
        return delta * (kept / (1 - self.p)).to(delta.dtype)

    def added(
        self, y: Tensor, x: Tensor, view: FrozenAttention | None = None, scale: Tensor | None = None
    ) -> Tensor:
        """As the tuner inside at inference."""
        if self.training and self.p > 0:
            return super().added(y, x, view, scale)
        return self.tuner.added(y, x, view, scale)
