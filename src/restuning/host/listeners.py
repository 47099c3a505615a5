"""Hooks that note what an attention is given beside the stream, for tuners that repeat its softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from restuning._errors import DecodingError, PlacementError
from restuning.host.call import Call, current
from restuning.sites import attention_inputs, first_tensor, has_past, returned_bias


@dataclass(frozen=True)
class RecordAttentionInputs:
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
        call.given[self.path] = attention_inputs(module, args, kwargs)
        if call.appended and (self.relative or call.given[self.path].rope is not None):
            raise PlacementError(
                "tokens appended at the stem have no place among relative positions",
                where=self.path,
                fix="use the method vpt-deep or prefix",
            )
        stream = first_tensor(args) if args else first_tensor(kwargs)
        if not call.appended or stream is None or call.given[self.path].mask is None:
            return None
        tokens = stream.shape[1]

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
class RecordPositionBias:
    """Notes the relative-position bias that an attention returns beside its output (T5)."""

    after: ClassVar[bool] = True
    slot: str
    path: str

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        """A forward hook."""
        call: Call | None = current(self.slot)
        if call is not None and self.path in call.given:
            call.given[self.path] = call.given[self.path]._replace(bias=returned_bias(output))


@dataclass(frozen=True)
class RecordTimestep:
    """Notes the time step that a diffusion model is given."""

    after: ClassVar[bool] = False
    slot: str
    place: int

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A forward pre-hook."""
        call: Call | None = current(self.slot)
        if call is None:
            return
        step = args[self.place] if self.place < len(args) else kwargs.get("timestep")
        call.time = None if step is None else torch.as_tensor(step, dtype=torch.float32).reshape(-1)


@dataclass(frozen=True)
class RecordMask:
    """Notes which tokens are real, where a model or one of its stacks is told.

    A stack's own mask comes after the model's and counts for its layers; one that is given in
    another form (BERT's encoder gets a mask of scores) leaves the model's as it is.
    """

    after: ClassVar[bool] = False
    slot: str
    place: int
    outermost: bool

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A forward pre-hook."""
        call: Call | None = current(self.slot)
        if call is None:
            return
        given = self.place < len(args) or "attention_mask" in kwargs
        mask = args[self.place] if self.place < len(args) else kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            call.real = mask.bool()
        elif mask is None and (given or self.outermost):
            call.real = None
        if call.looks_ahead:
            call.cache = kwargs.get("cache", kwargs.get("past_key_values"))
            if has_past(call.cache):
                raise DecodingError(
                    "a tuner that looks at all tokens cannot decode with a cache",
                    found="one token at a time is shown to it (a gate averages over tokens)",
                    fix="generate(..., use_cache=False), or tuners that work token by token",
                )
