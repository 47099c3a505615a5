"""Finds the readout of a backbone by comparing values of one forward with what it returns."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from restuning._torch import read_whole
from restuning.sites.linear import is_linear
from restuning.sites.readout import Pool, Readout

MATCH_TOLERANCE = 1e-5
"""Largest error between our pooled feature and the backbone's, relative to its maximum."""

UNIT_TOLERANCE = 1e-4
"""Largest distance of a vector's length from one: fp32 division leaves 1e-7, half precision 1e-3
of single values and less of their length."""

MOST_PREFIX_TOKENS = 6
"""Class, distillation and up to four register tokens are left out of a mean in known families."""

_CLASS_TOKENS = re.compile(r"cls_token|class_token|class_embedding|\bcls\b", re.I)


class ReadoutListener:
    """Hears what follows the last block, and finds the readout by comparing values.

    Attributes:
        sounds: Whether the backbone hears: its vector may be a mean of its first two tokens. Of images such
            (DeiT, distilled) were always read by the vector that they return, and saved so.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.last: Tensor | None = None
        self.norm = ""
        self.norm_out: Tensor | None = None
        self.guess: tuple[Pool, int] | None = None
        self.waiting = ""
        self.pooled: list[Tensor] = []
        self.linear: list[tuple[str, Tensor, Tensor | None]] = []
        self.sounds = False

    def note_block(self, output: Tensor) -> None:
        """A block has returned: whatever was heard before it is no readout."""
        self.last = output
        self.norm, self.norm_out, self.guess, self.waiting = "", None, None, ""
        self.pooled.clear()
        self.linear.clear()

    def enter(self, path: str, module: nn.Module, x: Tensor | None) -> None:
        """A module outside all blocks is about to run."""
        if self.last is None or x is None:
            return
        if x.dim() == 2:
            self.pooled.append(x.clone())
            if is_linear(module):
                self.linear.append((path, x.clone(), None))
        if "norm" not in type(module).__name__.lower() or self.norm:
            return
        # By memory order: a norm may read the stream reshaped.
        if x.numel() == self.last.numel() and torch.equal(x.reshape(-1), self.last.reshape(-1)):
            self.norm = self.waiting = path
        elif x.dim() == 2:
            self.guess = _match_pooling(_as_tokens(self.last, x.shape[-1]), [x])
            if self.guess:
                self.norm = self.waiting = path

    def leave(self, path: str, y: Tensor | None) -> None:
        """A module outside all blocks has returned."""
        # The output of the linear map that was entered last; see `_map_feature`.
        if self.linear and self.linear[-1][0] == path and y is not None:
            self.linear[-1] = (*self.linear[-1][:2], y.clone())
        if self.waiting and path == self.waiting and y is not None:
            self.norm_out, self.waiting = y.clone(), ""

    def conclude(self, output: Any, *, causal: bool, hierarchy: bool, first: bool) -> Readout:
        """Find the readout; its proof is "assumed" where no value of the backbone confirms it.

        Args:
            output: The backbone's.
            causal: Whether its layers mask the future.
            hierarchy: Whether its streams are maps, or change their width on the way.
            first: Whether its last stream has channels first.
        """
        assert self.last is not None
        own = read_vector(output)
        if own is not None and has_unit_length(own):
            return self._find_unit_length_readout(own, hierarchy, first)
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
        dim = self._find_width(normed, seen, first)
        match = _match_pooling(_as_tokens(normed, dim), seen)
        if match:
            return Readout(self.norm, match[0], dim, match[1], proof="exact")
        if self.sounds and _is_mean_of_two(_as_tokens(normed, dim), seen):
            return Readout(self.norm, "mean", dim, -2, proof="exact")
        if own is not None:
            return Readout(self.norm, "own", own.shape[-1], maps=first, proof="exact")
        names = [name for name, _ in self.model.named_parameters()]
        has_class_token = any(_CLASS_TOKENS.search(name) for name in names)
        # Grids are even as a rule, so an odd number of tokens still has the class token among them.
        keeps_it = has_class_token and _as_tokens(normed, dim).shape[1] % 2 == 1
        pool: Pool = "last" if causal else "cls" if keeps_it else "mean"
        return Readout(self.norm, pool, dim, maps=first)

    def _find_unit_length_readout(self, own: Tensor, hierarchy: bool, first: bool) -> Readout:
        """Find the readout of a tower (CLIP), which returns its feature at unit length."""
        rule = Readout(self.norm, "own", own.shape[-1], maps=first, proof="exact", unit=True)
        if hierarchy:
            return rule
        if self.guess is not None:
            assert self.norm_out is not None
            pool, skip = self.guess
            ways = [(pool, skip, pool == "mean", self.norm_out)]
        else:
            normed = self.norm_out if self.norm_out is not None else self.last
            assert normed is not None
            tokens = _as_tokens(normed, self._find_width(normed, self.pooled, first))
            ways = [(*each[:2], False, each[2]) for each in _list_poolings(tokens)]
        for pool, skip, pool_first, feature in ways:
            for path, value in self._map_feature(feature, own.shape[-1]):
                if value.shape == own.shape and _is_close(F.normalize(value, dim=-1), own):
                    return replace(rule, pool=pool, skip=skip, pool_first=pool_first, project=path)
        return rule

    def _map_feature(self, feature: Tensor, to: int) -> Iterator[tuple[str, Tensor]]:
        """Yield a pooled feature and what is made of it, each with the path of its linear map."""
        yield "", feature
        for path, entered, left in self.linear:
            # Heard, not computed again: so it holds for models whose weights are not there.
            if left is not None and entered.shape == feature.shape and _is_close(entered, feature):
                yield path, left
        for name, matrix in self.model.named_parameters():
            if matrix.shape == (feature.shape[-1], to) and not matrix.is_meta:
                yield name, feature @ read_whole(matrix)

    def _find_width(self, normed: Tensor, seen: list[Tensor], first: bool) -> int:
        if normed.dim() != 4:
            return normed.shape[-1]
        if first and normed is self.last:
            # Maps that nothing is made of (PoolFormer): their width is that of the stream.
            return normed.shape[1]
        # Channels first only where a pooled vector of that width was seen, and not of the other.
        widths = {t.shape[-1] for t in seen}
        return (
            normed.shape[1] if normed.shape[1] in widths - {normed.shape[-1]} else normed.shape[-1]
        )


def read_vector(output: Any) -> Tensor | None:
    """The backbone's own feature in its output: a tensor `b d` (or `b d 1 1`), if there is one."""
    if isinstance(output, dict):
        values = [output.get("pooler_output"), *output.values()]
    else:
        values = output if isinstance(output, (tuple, list)) else [output]
    for value in values:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 2:
            continue
        # `b d 1 1` is what global pooling leaves in convolutional networks.
        if set(value.shape[2:]) <= {1}:
            return value.flatten(1)
    return None


def _as_tokens(x: Tensor, dim: int) -> Tensor:
    if x.dim() == 4:
        return x.flatten(1, 2) if x.shape[-1] == dim else x.flatten(2).mT
    return x


def _list_poolings(tokens: Tensor) -> list[tuple[Pool, int, Tensor]]:
    """Ways to make one vector of tokens: the readout, the tokens it leaves out, its value."""
    if tokens.dim() != 3:
        return []
    ways: list[tuple[Pool, int, Tensor]] = [("cls", 0, tokens[:, 0])]
    ways.extend(
        ("mean", skip, tokens[:, skip:].mean(1))
        # A mean of one token would be that token, whatever the length of the next input.
        for skip in range(min(MOST_PREFIX_TOKENS, tokens.shape[1] - 1))
    )
    ways.append(("last", 0, tokens[:, -1]))
    return ways


def _match_pooling(tokens: Tensor, seen: list[Tensor]) -> tuple[Pool, int] | None:
    candidates = _list_poolings(tokens)
    for value in seen:
        for pool, skip, candidate in candidates:
            if candidate.shape == value.shape and _is_close(candidate, value):
                return pool, skip
    return None


def _is_mean_of_two(tokens: Tensor, seen: list[Tensor]) -> bool:
    if tokens.dim() != 3 or tokens.shape[1] < 3:
        return False
    mean = tokens[:, :2].mean(1)
    return any(value.shape == mean.shape and _is_close(mean, value) for value in seen)


def _is_close(candidate: Tensor, value: Tensor) -> bool:
    return bool((candidate - value).abs().max() <= MATCH_TOLERANCE * value.abs().max())


def has_unit_length(vectors: Tensor) -> bool:
    """Whether every vector of a batch has Euclidean length one."""
    return bool(((vectors.norm(dim=-1) - 1).abs() <= UNIT_TOLERANCE).all())
