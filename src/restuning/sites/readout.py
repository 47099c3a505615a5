"""How a backbone turns its last stream into one feature vector: final norm and pooling, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from restuning._errors import UnknownNameError
from restuning._grid import to_grid
from restuning._torch import read_whole
from restuning.runtime.precision import HALF_PRECISION
from restuning.sites.half import is_wider, run_linear, run_norm

Pool = Literal["cls", "mean", "last", "all", "grid", "own"]
POOLS: tuple[str, ...] = get_args(Pool)


def parse_pool(name: str) -> Pool:
    """A pooling by its name.

    Raises:
        UnknownNameError: No such pooling.
    """
    if name not in POOLS:
        raise UnknownNameError("no such readout", where=name, fix=f"one of: {', '.join(POOLS)}")
    return cast("Pool", name)


@dataclass(frozen=True, slots=True)
class Readout:
    """`feature = pool(norm(state))`, or `norm(pool(state))` when `pool_first`.

    Attributes:
        norm: Path of the frozen final norm, "" for none.
        pool: "cls", "mean", "last", "all" (no pooling: every token), "grid" (the patches where they stand, for an
            answer at every place of an image), or "own": the vector that
            the backbone itself returns, whatever it does after its last block. Maps and
            hierarchies are read so, and a last stream whose pooling is not one of these.
        skip: Tokens at the start left out of a mean; -2 for a mean over the first two alone (AST's class and
            distillation tokens).
        pool_first: Whether the backbone pools before its norm.
        dim: Width of the feature.
        proof: "exact" if it equals a value seen in the backbone's own forward, else "assumed".
        maps: Whether the norm reads `b d h w`.
        project: Path of a frozen map after the pooling (a linear module, or a matrix that features
            are multiplied with from the left), "" for none.
        unit: Whether the feature is divided by its Euclidean length: the towers of a
            vision-language model answer so, and a cosine is then a product.
    """

    norm: str
    pool: Pool
    dim: int
    skip: int = 0
    pool_first: bool = False
    proof: str = "assumed"
    maps: bool = False
    project: str = ""
    unit: bool = False

    def __call__(self, model: nn.Module, state: Tensor, mask: Tensor | None = None) -> Tensor:
        """`b n d` (or `b h w d`) to `b d`; `b n d` for "all", `b h w d` for "grid".

        A class or last token alone (`b 1 d`) is a valid state for "cls" and "last", the backbone's
        own vector (`b 1 d`) the only one for "own".

        Args:
            model: The backbone, whose norm is used.
            state: The last stream.
            mask: Which tokens are real, `b n`: "mean" is over real tokens, "cls" the first and
                "last" the last of them, wherever the padding is.
        """
        if self.pool == "own":
            return F.normalize(state[:, 0], dim=-1) if self.unit else state[:, 0]
        feature = self._pool(model, state, mask)
        if self.project:
            feature = apply_projection(model, self.project, feature)
        return F.normalize(feature, dim=-1) if self.unit else feature

    def _pool(self, model: nn.Module, state: Tensor, mask: Tensor | None) -> Tensor:
        norm = model.get_submodule(self.norm) if self.norm else None
        if norm is not None and not self.pool_first:
            # A norm of maps reads channels first; streams are kept with channels last.
            state = (
                run_norm(norm, state.movedim(-1, 1)).movedim(1, -1)
                if self.maps
                else run_norm(norm, state)
            )
        if self.pool == "grid":
            return to_grid(state)
        if state.dim() == 4:
            state = state.flatten(1, 2)
        if self.pool == "all":
            return state
        if self.pool == "mean":
            pooled = average_tokens(state, mask, self.skip)
        else:
            pooled = take_one_token(state, self.pool, mask)[:, 0]
        return run_norm(norm, pooled) if norm is not None and self.pool_first else pooled


def apply_projection(model: nn.Module, path: str, feature: Tensor) -> Tensor:
    """A frozen linear map of the backbone, or a matrix that it keeps as a plain parameter."""
    owner, _, name = path.rpartition(".")
    map_: Any = getattr(model.get_submodule(owner), name)
    if isinstance(map_, nn.Module):
        return run_linear(map_, feature)
    map_ = read_whole(map_)
    return feature @ (map_.to(feature.dtype) if is_wider(feature, map_) else map_)


def take_one_token(state: Tensor, which: str, mask: Tensor | None = None) -> Tensor:
    """The first ("cls") or last ("last") real token, `b n d -> b 1 d`."""
    if mask is None or state.shape[1] == 1:
        return state[:, :1] if which == "cls" else state[:, -1:]
    steps = torch.arange(1, state.shape[1] + 1, device=state.device)
    # The largest of 1, 2, ... at real tokens is the last of them, that of n, n - 1, ... the first.
    order = steps if which == "last" else steps.flip(0)
    place = (fit_mask(mask, state) * order).argmax(1)
    return state.gather(1, place[:, None, None].expand(-1, 1, state.shape[-1]))


def average_tokens(state: Tensor, mask: Tensor | None = None, skip: int = 0) -> Tensor:
    """Mean over real tokens but the first `skip`, or over the first `-skip` alone, `b n d -> b d`."""
    if skip < 0:
        return state[:, :-skip].mean(1)
    state = state[:, skip:]
    if mask is None:
        return state.mean(1)
    real = fit_mask(mask, state).unsqueeze(-1)
    # What a backbone leaves at padding may be anything, also NaN. In fp16 a sum may be infinite.
    kind = torch.float32 if state.dtype in HALF_PRECISION else state.dtype
    total = torch.where(real, state, torch.zeros_like(state)).sum(1, dtype=kind)
    return (total / real.sum(1).clamp(min=1).to(kind)).to(state.dtype)


def fit_mask(mask: Tensor, state: Tensor) -> Tensor:
    """The mask of the last n tokens, `b m -> b n`, repeated where a state holds several tasks."""
    mask = mask[:, mask.shape[1] - state.shape[1] :]
    times = state.shape[0] // mask.shape[0]
    return mask if times == 1 else mask.repeat(times, 1)
