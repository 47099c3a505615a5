"""Modules without weights: copies whose tensors have shapes only, and forwards that need no weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from restuning._torch import (
    FakeTensorMode,
    TorchDispatchMode,
    operation_name,
    operation_of,
    storage_key,
    tree_leaves,
    tree_map,
)
from restuning.forecast.ledger import FORMULAS


def shapes_only() -> FakeTensorMode:
    """The mode in which operations compute shapes, strides and devices, and nothing else."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def make_fake(tensor: Tensor, mode: FakeTensorMode, device: str = "cpu") -> Tensor:
    """A tensor of the same shape, strides and dtype that holds nothing."""
    with mode:
        fake = torch.empty_strided(
            tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device
        )
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, requires_grad=tensor.requires_grad)
    return fake


def strip_weights(module: nn.Module, mode: FakeTensorMode, device: str = "cpu") -> nn.Module:
    """A copy of a module, hooks and all, without its weights; they may be on `meta` already.

    Args:
        module: Left as it is.
        mode: Of `shapes_only()`.
        device: Whose kernels are to be forecast; none such needs to be here.
    """
    # deepcopy takes what `memo` holds in place of copying: weights are never read.
    memo = {id(t): make_fake(t, mode, device) for t in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, memo)


def expand_example(example: Any, size: int, mode: FakeTensorMode, device: str = "cpu") -> Any:
    """An example (tensors with a batch axis of 1, in any nesting) as a batch that holds nothing."""

    def widen(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        with mode:
            return torch.empty(size, *value.shape[1:], dtype=value.dtype, device=device)

    return tree_map(widen, example)


class AbsentWeights(TorchDispatchMode):
    """While it is on, a model whose weights are on `meta` can be run on a real example.

    A host finds its sites by a forward in which `next == stream + branch` must hold. Sums hold
    whatever the branches are, so products with weights that are not there give noise, and small
    weights outside of products (norms, positions, scales) are drawn when they meet a real tensor.
    What is proved about sums and poolings this way is proved for all weights. Maps of attention,
    which are proved by their products, cannot be: tuners that borrow them need real weights.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self._random = torch.Generator().manual_seed(seed)
        self._drawn: dict[tuple, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """One operation."""
        named: dict[str, Any] = kwargs or {}
        tensors = [t for t in tree_leaves((args, named)) if isinstance(t, Tensor)]
        absent = [t for t in tensors if t.is_meta]
        # Moved to a real device, as positions are to that of the stream, a weight must be drawn.
        moved = torch.device(named.get("device") or "meta").type != "meta"
        if not absent or (len(absent) == len(tensors) and not moved):
            return func(*args, **named)
        # A product with weights that are not there: only the shape of its result is known.
        if operation_of(func) in FORMULAS or "embedding" in operation_name(func):
            out = func(*tree_map(_to_meta, args), **tree_map(_to_meta, named))
            return tree_map(self._noise, out)
        return func(*tree_map(self._draw, args), **tree_map(self._draw, named))

    def _noise(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if not value.is_floating_point():
            return torch.zeros(value.shape, dtype=value.dtype)
        return torch.randn(value.shape, generator=self._random).to(value.dtype)

    def _draw(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_meta:
            return value
        key = (storage_key(value.untyped_storage()), value.storage_offset(), *value.shape)
        if key not in self._drawn:
            if value.is_floating_point():
                # Away from zero: some are variances.
                real = torch.rand(value.shape, generator=self._random).to(value.dtype) + 0.5
            else:
                real = torch.ones(value.shape, dtype=value.dtype)
            # The weight is kept beside it: the address must not be used again.
            self._drawn[key] = (value, real)
        return self._drawn[key][1]


def _to_meta(value: Any) -> Any:
    if isinstance(value, Tensor) and not value.is_meta:
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")
    return value
