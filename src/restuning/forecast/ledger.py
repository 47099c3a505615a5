"""A ledger of live memory: every storage that an operation makes, until it is let go."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

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
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.flops = self.moved = self.calls = 0
        self._held: dict[int, weakref.ref] = {}

    def hold(self, tensors: Iterable[Any]) -> bool:
        """Count these tensors from now on; whether any storage among them is new."""
        new = False
        for tensor in tensors:
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._held:
                continue
            new = True
            size = storage.nbytes()

            def gone(_: Any, key: int = key, size: int = size) -> None:
                self.live -= size
                self._held.pop(key, None)

            self._held[key] = weakref.ref(storage, gone)
            self.live += size
        self.peak = max(self.peak, self.live)
        return new

    def start(self) -> int:
        """Forget the peak and the counts; what is held stays. Returns the bytes held."""
        self.peak = self.live
        self.flops = self.moved = self.calls = 0
        return self.live

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """One operation."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func._schema.name in FREE:
            return out
        results = tree_leaves(out)
        if self.hold(results) or func._schema.is_mutable:
            self.calls += 1
            self.moved += sum(
                t.numel() * t.element_size()
                for t in (*tree_leaves((args, kwargs)), *results)
                if isinstance(t, Tensor)
            )
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        return out


def saved(weights: Iterable[Tensor]) -> tuple[torch.autograd.graph.saved_tensors_hooks, dict]:
    """A context that notes what autograd saves for backward, and the note: storage to bytes.

    Args:
        weights: Tensors that are there anyway and are left out.
    """
    known = {w.untyped_storage()._cdata for w in weights}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            seen[storage._cdata] = storage.nbytes()
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), seen
