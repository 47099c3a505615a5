"""Hooks that change nothing and write down what passes beside the stream: time steps, masks, caches.

Tuners that repeat an attention's softmax, and readouts over real tokens, need it. The picture at the
top of `hooks.py` shows where each of them fires.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from restuning._errors import DecodingError, PlacementError
from restuning.host.call import Call, current_call
from restuning.sites import first_tensor, has_past, read_attention_inputs, read_position_bias


@dataclass(frozen=True)
class RecordAttentionInputs:
    """Writes down what an attention is given beside the stream, for tuners that repeat its softmax.

    Where a stem prompt has appended tokens, the mask is made longer, so that they are seen.

    Args:
        slot: The host's, under which this thread keeps the record of its call.
        path: Path of the attention.
        relative: Whether it adds biases of relative positions, among which tokens appended at the
            stem have no place.
    """

    after: ClassVar[bool] = False
    slot: str
    path: str
    relative: bool

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """A forward pre-hook."""
        call: Call | None = current_call(self.slot)
        if call is None or not call.lends_projections:
            return None
        call.attention[self.path] = read_attention_inputs(module, args, kwargs)
        if call.appended and (self.relative or call.attention[self.path].rope is not None):
            raise PlacementError(
                "tokens appended at the stem have no place among relative positions",
                where=self.path,
                fix="use the method vpt-deep or prefix",
            )
        stream = first_tensor(args) if args else first_tensor(kwargs)
        if not call.appended or stream is None or call.attention[self.path].mask is None:
            return None
        tokens = stream.shape[1]

        def lengthen(value: Any) -> Any:
            return _lengthen_mask(value, tokens) if _is_mask(value) else value

        return tuple(map(lengthen, args)), {k: lengthen(v) for k, v in kwargs.items()}


def _is_mask(value: Any) -> bool:
    # `b 1 n m`; what has an axis of heads is a bias of positions.
    return isinstance(value, Tensor) and value.dim() == 4 and value.shape[1] == 1


def _lengthen_mask(mask: Tensor, tokens: int) -> Tensor:
    """A mask in which appended tokens are seen, and see what the token before them sees."""
    more = tokens - mask.shape[-1]
    if more <= 0:
        return mask
    # Boolean masks say what is seen, others are added to the scores.
    seen = mask.new_ones(()) if mask.dtype == torch.bool else mask.new_zeros(())
    mask = torch.cat([mask, seen.expand(*mask.shape[:-1], more)], -1)
    if mask.shape[-2] == 1:
        return mask
    # The rows of appended tokens: what the last real token sees.
    return torch.cat([mask, mask[..., -1:, :].expand(*mask.shape[:2], more, -1)], -2)


@dataclass(frozen=True)
class RecordPositionBias:
    """Writes down the relative-position bias that an attention returns beside its output (T5)."""

    after: ClassVar[bool] = True
    slot: str
    path: str

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        """A forward hook."""
        call: Call | None = current_call(self.slot)
        if call is not None and self.path in call.attention:
            call.attention[self.path] = call.attention[self.path]._replace(
                bias=read_position_bias(output)
            )


@dataclass(frozen=True)
class RecordTimestep:
    """Writes down the time step that a diffusion model is given.

    Args:
        slot: The host's, under which this thread keeps the record of its call.
        place: Position of the argument `timestep`.
    """

    after: ClassVar[bool] = False
    slot: str
    place: int

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A forward pre-hook."""
        call: Call | None = current_call(self.slot)
        if call is None:
            return
        step = args[self.place] if self.place < len(args) else kwargs.get("timestep")
        # Pipelines give a plain number, a scalar tensor, or one step for each row.
        call.time = None if step is None else torch.as_tensor(step, dtype=torch.float32).reshape(-1)


@dataclass(frozen=True)
class RecordMask:
    """Writes down which tokens are real, where a model or one of its stacks is given a mask.

    A stack's own mask comes after the model's and counts for its layers; one in another form (BERT's
    encoder gets a mask of scores) leaves the model's as it is.

    Args:
        slot: The host's, under which this thread keeps the record of its call.
        place: Position of the argument `attention_mask`.
        outermost: Whether the module is the model, whose missing mask means that all are real.
    """

    after: ClassVar[bool] = False
    slot: str
    place: int
    outermost: bool

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A forward pre-hook."""
        call: Call | None = current_call(self.slot)
        if call is None:
            return
        is_given = self.place < len(args) or "attention_mask" in kwargs
        mask = args[self.place] if self.place < len(args) else kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            call.real_tokens = mask.bool()
        elif mask is None and (is_given or self.outermost):
            call.real_tokens = None
        if call.looks_ahead and has_past(kwargs.get("cache", kwargs.get("past_key_values"))):
            raise DecodingError(
                "a tuner that looks at all tokens cannot decode with a cache",
                found="one token at a time is shown to it (a gate averages over tokens)",
                fix="generate(..., use_cache=False), or tuners that work token by token",
            )
