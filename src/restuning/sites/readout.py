"""How a backbone turns its last stream into one feature vector: final norm and pooling, as data."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

Pool = Literal["cls", "mean", "last", "all", "own"]
POOLS: tuple[str, ...] = get_args(Pool)

MATCH_TOLERANCE = 1e-5
"""Largest error between our pooled feature and the backbone's, relative to its maximum."""

MOST_PREFIX_TOKENS = 6
"""Class, distillation and up to four register tokens are left out of a mean in known families."""

_CLASS_TOKENS = re.compile(r"cls_token|class_token|class_embedding|\bcls\b", re.I)


@dataclass(frozen=True, slots=True)
class Readout:
    """`feature = pool(norm(state))`, or `norm(pool(state))` when `pool_first`.

    Attributes:
        norm: Path of the frozen final norm, "" for none.
        pool: "cls", "mean", "last", "all" (no pooling, for dense tasks), or "own": the vector that
            the backbone itself returns, whatever it does after its last block. Maps and
            hierarchies are read so, and a last stream whose pooling is not one of these.
        skip: Tokens at the start left out of a mean.
        pool_first: Whether the backbone pools before its norm.
        dim: Width of the feature.
        proof: "exact" if it equals a value seen in the backbone's own forward, else "assumed".
        maps: Whether the norm reads `b d h w`.
    """

    norm: str
    pool: Pool
    dim: int
    skip: int = 0
    pool_first: bool = False
    proof: str = "assumed"
    maps: bool = False

    def __call__(self, model: nn.Module, state: Tensor, mask: Tensor | None = None) -> Tensor:
        """`b n d` (or `b h w d`) to `b d`; `b n d` for "all".

        A class or last token alone (`b 1 d`) is a valid state for "cls" and "last", the backbone's
        own vector (`b 1 d`) the only one for "own".

        Args:
            model: The backbone, whose norm is used.
            state: The last stream.
            mask: Which tokens are real, `b n`: "mean" is over real tokens, "cls" the first and
                "last" the last of them, wherever the padding is.
        """
        if self.pool == "own":
            return state[:, 0]
        norm = model.get_submodule(self.norm) if self.norm else None
        if norm is not None and not self.pool_first:
            # A norm of maps reads channels first; streams are kept with channels last.
            state = norm(state.movedim(-1, 1)).movedim(1, -1) if self.maps else norm(state)
        if state.dim() == 4:
            state = state.flatten(1, 2)
        if self.pool == "all":
            return state
        if self.pool == "mean":
            pooled = mean_of(state, mask, self.skip)
        else:
            pooled = one_token(state, self.pool, mask)[:, 0]
        return norm(pooled) if norm is not None and self.pool_first else pooled


def one_token(state: Tensor, which: str, mask: Tensor | None = None) -> Tensor:
    """The first ("cls") or last ("last") real token, `b n d -> b 1 d`."""
    if mask is None or state.shape[1] == 1:
        return state[:, :1] if which == "cls" else state[:, -1:]
    steps = torch.arange(1, state.shape[1] + 1, device=state.device)
    # The largest of 1, 2, ... at real tokens is the last of them, that of n, n - 1, ... the first.
    order = steps if which == "last" else steps.flip(0)
    place = (fitted(mask, state) * order).argmax(1)
    return state.gather(1, place[:, None, None].expand(-1, 1, state.shape[-1]))


def mean_of(state: Tensor, mask: Tensor | None = None, skip: int = 0) -> Tensor:
    """Mean over real tokens but the first `skip`, `b n d -> b d`."""
    state = state[:, skip:]
    if mask is None:
        return state.mean(1)
    real = fitted(mask, state).unsqueeze(-1)
    # What a backbone leaves at padding may be anything, also NaN.
    total = torch.where(real, state, torch.zeros_like(state)).sum(1)
    return total / real.sum(1).clamp(min=1).to(state.dtype)


def fitted(mask: Tensor, state: Tensor) -> Tensor:
    """The mask of the last n tokens, `b m -> b n`, repeated where a state holds several tasks."""
    mask = mask[:, mask.shape[1] - state.shape[1] :]
    times = state.shape[0] // mask.shape[0]
    return mask if times == 1 else mask.repeat(times, 1)


class ReadoutListener:
    """Hears what follows the last block, and finds the readout by comparing values."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.last: Tensor | None = None
        self.norm = ""
        self.norm_out: Tensor | None = None
        self.guess: tuple[Pool, int] | None = None
        self.waiting = ""
        self.pooled: list[Tensor] = []

    def block(self, output: Tensor) -> None:
        """A block has returned: whatever was heard before it is no readout."""
        self.last = output
        self.norm, self.norm_out, self.guess, self.waiting = "", None, None, ""
        self.pooled.clear()

    def enter(self, path: str, module: nn.Module, x: Tensor | None) -> None:
        """A module outside all blocks is about to run."""
        if self.last is None or x is None:
            return
        if x.dim() == 2:
            self.pooled.append(x.clone())
        if "norm" not in type(module).__name__.lower() or self.norm:
            return
        if x.numel() == self.last.numel() and torch.equal(x.reshape(-1), self.last.reshape(-1)):
            self.norm = self.waiting = path
        elif x.dim() == 2:
            self.guess = _pooling(_tokens(self.last, x.shape[-1]), [x])
            if self.guess:
                self.norm = self.waiting = path

    def leave(self, path: str, y: Tensor | None) -> None:
        """A module outside all blocks has returned."""
        if self.waiting and path == self.waiting and y is not None:
            self.norm_out, self.waiting = y.clone(), ""

    def found(self, output: Any, *, causal: bool, hierarchy: bool, first: bool) -> Readout:
        """The readout; "assumed" where no value of the backbone confirms it.

        Args:
            output: The backbone's.
            causal: Whether its layers mask the future.
            hierarchy: Whether its streams are maps, or change their width on the way.
            first: Whether its last stream has channels first.
        """
        assert self.last is not None
        own = vector_of(output)
        # The norm is kept for tasks that ask for a pooled or dense readout of their own.
        if hierarchy and own is not None:
            return Readout(self.norm, "own", own.shape[-1], maps=first, proof="exact")
        if self.guess is not None:
            assert self.norm_out is not None
            pool, skip = self.guess
            dim = self.norm_out.shape[-1]
            return Readout(self.norm, pool, dim, skip, pool == "mean", proof="exact")
        normed = self.norm_out if self.norm_out is not None else self.last
        outputs = output.values() if isinstance(output, dict) else [output]
        seen = [t for t in outputs if isinstance(t, Tensor) and t.dim() == 2] + self.pooled
        dim = self._width(normed, seen)
        match = _pooling(_tokens(normed, dim), seen)
        if match:
            return Readout(self.norm, match[0], dim, match[1], proof="exact")
        if own is not None:
            return Readout(self.norm, "own", own.shape[-1], maps=first, proof="exact")
        names = [name for name, _ in self.model.named_parameters()]
        has_class_token = any(_CLASS_TOKENS.search(name) for name in names)
        keeps_it = has_class_token and _tokens(normed, dim).shape[1] % 2 == 1
        pool: Pool = "last" if causal else "cls" if keeps_it else "mean"
        return Readout(self.norm, pool, dim, maps=first)

    def _width(self, normed: Tensor, seen: list[Tensor]) -> int:
        if normed.dim() != 4:
            return normed.shape[-1]
        widths = {t.shape[-1] for t in seen}
        return (
            normed.shape[1] if normed.shape[1] in widths - {normed.shape[-1]} else normed.shape[-1]
        )


def vector_of(output: Any) -> Tensor | None:
    """The backbone's own feature in its output: a tensor `b d` (or `b d 1 1`), if there is one."""
    if isinstance(output, dict):
        values = [output.get("pooler_output"), *output.values()]
    else:
        values = output if isinstance(output, (tuple, list)) else [output]
    for value in values:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 2:
            continue
        if set(value.shape[2:]) <= {1}:
            return value.flatten(1)
    return None


def _tokens(x: Tensor, dim: int) -> Tensor:
    if x.dim() == 4:
        return x.flatten(1, 2) if x.shape[-1] == dim else x.flatten(2).mT
    return x


def _pooling(tokens: Tensor, seen: list[Tensor]) -> tuple[Pool, int] | None:
    if tokens.dim() != 3:
        return None
    candidates: list[tuple[Pool, int, Tensor]] = [("cls", 0, tokens[:, 0])]
    candidates.extend(
        ("mean", skip, tokens[:, skip:].mean(1))
        for skip in range(min(MOST_PREFIX_TOKENS, tokens.shape[1]))
    )
    candidates.append(("last", 0, tokens[:, -1]))
    for value in seen:
        for pool, skip, candidate in candidates:
            if candidate.shape == value.shape and bool(
                (candidate - value).abs().max() <= MATCH_TOLERANCE * value.abs().max()
            ):
                return pool, skip
    return None
