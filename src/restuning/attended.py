"""Hooks that note what an attention is given beside the stream, for tuners that repeat its softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from restuning._errors import MapsError
from restuning.record import Call, current
from restuning.sites import first_tensor, given, returned_bias


@dataclass(frozen=True)
class Beside:
    """Notes what an attention is given beside the stream, for tuners that repeat its softmax."""

    after: ClassVar[bool] = False
    slot: str
    path: str
    relative: bool

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """A forward pre-hook."""
        call: Call | None = current(self.slot)
        if call is None or not call.lends:
            return None
        call.given[self.path] = given(module, args, kwargs)
        if call.appended and (self.relative or call.given[self.path].rope is not None):
            raise MapsError(
                "tokens appended at the stem have no place among relative positions",
                where=self.path,
                fix="use the method vpt-deep or prefix",
            )
        if not call.appended or call.given[self.path].mask is None:
            return None
        tokens = (first_tensor(args) if args else first_tensor(kwargs)).shape[1]  # type: ignore[union-attr]

        def longer(value: Any) -> Any:
            return _seen_too(value, tokens) if _is_mask(value) else value

        return tuple(map(longer, args)), {k: longer(v) for k, v in kwargs.items()}


def _is_mask(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4 and value.shape[1] == 1


def _seen_too(mask: Tensor, tokens: int) -> Tensor:
    """A mask in which appended tokens are seen, and see what the token before them sees."""
    more = tokens - mask.shape[-1]
    if more <= 0:
        return mask
    seen = mask.new_ones(()) if mask.dtype == torch.bool else mask.new_zeros(())
    mask = torch.cat([mask, seen.expand(*mask.shape[:-1], more)], -1)
    if mask.shape[-2] == 1:
        return mask
    return torch.cat([mask, mask[..., -1:, :].expand(*mask.shape[:2], more, -1)], -2)


@dataclass(frozen=True)
class Bias:
    """Notes the relative-position bias that an attention returns beside its output (T5)."""

    after: ClassVar[bool] = True
    slot: str
    path: str

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        """A forward hook."""
        call: Call | None = current(self.slot)
        if call is not None and self.path in call.given:
            call.given[self.path] = call.given[self.path]._replace(bias=returned_bias(output))
