"""A ledger of live memory: every storage that an operation makes, until it is let go."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, shape_wrapper

from restuning._torch import (
    FUSED_ATTENTION,
    TorchDispatchMode,
    operation_name,
    operation_of,
    storage_key,
    tree_leaves,
    writes_in_place,
)


def _fused_attention(x: tuple, *args: Any, **kwargs: Any) -> int:
    """Products of `nn.MultiheadAttention`'s inference kernel: four maps, scores and their sum."""
    b, n, d = x
    return 8 * b * n * d * d + 4 * b * n * n * d


FORMULAS = {
    **flop_registry,
    FUSED_ATTENTION: shape_wrapper(_fused_attention),
}
"""Operations whose flops are counted: torch's own table, and one it lacks."""

FREE = {"prim::device", "profiler::_record_function_enter_new", "profiler::_record_function_exit"}
"""Calls that compute nothing."""


class Ledger(TorchDispatchMode):
    """While it is on, writes down what operations allocate, free, compute and move.

    Memory is that of storages, so views are free and what only Python or autograd still holds is
    counted as long as it is held. Scratch memory inside a kernel is not seen.

    Attributes:
        live: Bytes held now.
        peak: Most bytes held at once.
        flops: Of products, convolutions and attention, as `torch.utils.flop_counter` counts them.
        moved: Bytes read and written by operations that are not views.
        calls: Operations that are not views.
        operands: Bytes of what the largest product reads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.flops = self.moved = self.calls = self.operands = 0
        self._live: dict[int, weakref.ref] = {}

    def hold(self, tensors: Iterable[Any]) -> bool:
        """Count these tensors from now on; whether any storage among them is new."""
        new = False
        for tensor in tensors:
            if not isinstance(tensor, Tensor):
                continue
            # Of the storage, not the tensor: views share one.
            storage = tensor.untyped_storage()
            key = storage_key(storage)
            if key in self._live:
                continue
            new = True
            size = storage.nbytes()

            # Called when the last tensor lets go: that is when memory is free again.
            def free(_: Any, key: int = key, size: int = size) -> None:
                self.live -= size
                self._live.pop(key, None)

            self._live[key] = weakref.ref(storage, free)
            self.live += size
        self.peak = max(self.peak, self.live)
        return new

    def start(self) -> int:
        """Forget the peak and the counts; what is held stays. Returns the bytes held."""
        self.peak = self.live
        self.flops = self.moved = self.calls = self.operands = 0
        return self.live

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """One operation."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if operation_name(func) in FREE:
            return out
        results = tree_leaves(out)
        # What makes no new storage and changes none is a view: no traffic, and no call to speak of.
        if self.hold(results) or writes_in_place(func):
            read = _bytes(tree_leaves((args, kwargs)))
            self.calls += 1
            self.moved += read + _bytes(results)
            count = FORMULAS.get(operation_of(func))
            if count is not None:
                self.flops += count(*args, **kwargs, out_val=out)
                self.operands = max(self.operands, read)
        return out


def _bytes(values: Iterable[Any]) -> int:
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))


class SavedTensors:
    """Notes what autograd saves for backward while its hooks are on.

    Args:
        weights: Tensors that are there anyway and are left out.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self._known = {storage_key(w.untyped_storage()) for w in weights}
        self._seen: dict[int, weakref.ref] = {}

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        """The context."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def bytes(self) -> int:
        """Of storages that are saved still, each once: parts of a graph may be dropped again."""
        alive = [seen() for seen in self._seen.values()]
        return sum(storage.nbytes() for storage in alive if storage is not None)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage_key(storage)
        if key not in self._known:
            self._seen[key] = weakref.ref(storage)
        return tensor
