"""Every use of torch that is not public: small functions, each with the reason why it must be.

Nothing else in the package touches a private name of torch (a test compares), so that a new torch
which renames one breaks `tests/unit/test_torch_internals.py`, a test a function, and is mended here.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch.vmap import lazy_load_decompositions
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointWrapper as CheckpointWrapper,
)
from torch.nn.utils import parametrize
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# `FakeTensorMode` (tensors with shapes and no contents), `TorchDispatchMode` (sees every operation)
# and `CheckpointWrapper` (takes its own prefix out of `state_dict` keys) are classes that torch
# documents in tutorials and tests, and keeps in private modules; there are no public ones.

_functorch: Any = getattr(torch._C, "_functorch")  # noqa: B009 (torch declares no type for it)

CHECKPOINT_PREFIX = "_checkpoint_wrapped_module."
"""What `named_parameters` of a `CheckpointWrapper` puts before the names of its module."""

FUSED_ATTENTION: Any = torch.ops.aten._native_multi_head_attention
"""The inference kernel of `nn.MultiheadAttention`: an operation of its own that torch's counter of
flops lacks, and that has no public name."""


OWN_ATTRIBUTES = frozenset(vars(nn.Module()))
"""Names of what every module keeps: its children, tensors, hooks and mode."""


def copy_module(
    module: nn.Module,
    shell: nn.Module,
    children: Mapping[int, nn.Module],
    tensors: Mapping[int, Tensor],
    relink: Callable[[Any], Any],
) -> None:
    """Make an empty module a copy of another that shares its tensors.

    Public is `copy.deepcopy`, which copies every tensor, and `torch.func.functional_call`, which puts
    other tensors into the module itself for a while, where other threads see them.

    Args:
        module: Left as it is.
        shell: A new object of its class.
        children: Copies of modules, by the identity of the original.
        tensors: What takes the place of a tensor, likewise.
        relink: What becomes of any other attribute.
    """
    attributes = dict(module.__dict__)
    for kind in ("_parameters", "_buffers"):
        attributes[kind] = {
            n: None if t is None else tensors.get(id(t), t)
            for n, t in list(attributes[kind].items())
        }
    attributes["_modules"] = {
        n: None if m is None else children[id(m)] for n, m in attributes["_modules"].items()
    }
    # Compiled in place: what was made of it is bound to the original.
    attributes.pop("_compiled_call_impl", None)
    for name in attributes.keys() - OWN_ATTRIBUTES:
        attributes[name] = relink(attributes[name])
    for name in ("_forward_hooks", "_forward_pre_hooks"):
        # Methods and functions; what hooks are else they are given their module.
        hooks = attributes[name]
        attributes[name] = type(hooks)(
            (n, relink(h) if isinstance(h, (MethodType, FunctionType, partial)) else h)
            for n, h in hooks.items()
        )
    shell.__dict__.update(attributes)


def copy_bare(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a module without any hooks, with other tensors; the module itself is not touched.

    Public is `copy.deepcopy`, which takes hooks and gradients along and cannot copy what was computed.

    Args:
        module: With what it holds.
        change: A tensor to the one that the copy has.
    """
    if is_sharded_module(module):
        # Made anew, its class makes a module of the one that it stands for, and wants its arguments.
        bare: Any = object.__new__(type(module))
        vars(bare).update(vars(module))
    else:
        bare = copy.copy(module)
    attributes = vars(module)
    parts: dict[str, Any] = {
        kind: {n: None if t is None else change(t) for n, t in attributes[kind].items()}
        for kind in ("_parameters", "_buffers")
    }
    parts["_modules"] = {
        n: None if m is None else copy_bare(m, change) for n, m in attributes["_modules"].items()
    }
    parts |= {n: type(v)() for n, v in attributes.items() if "_hooks" in n and n.startswith("_")}
    vars(bare).update(parts)
    vars(bare).pop("_compiled_call_impl", None)
    return bare


def without_compiler(model: nn.Module) -> nn.Module:
    """The module inside what `torch.compile(model)` returned, whose class is not public."""
    return getattr(model, "_orig_mod", model)


def open_vmap(values: Tensor) -> tuple[Tensor, int]:
    """Open a `torch.vmap` over the first axis; returns what a function inside would see, and a level.

    `torch.vmap` maps a function. Here what runs inside is the rest of somebody else's forward, which
    begins in one hook and ends in another. Every level must be closed, the innermost first.

    Args:
        values: `k ...`.
    """
    # Once a process: without it an operation that has only a decomposition fails inside.
    lazy_load_decompositions()
    level = _functorch._vmap_increment_nesting(values.shape[0], "different")
    return _functorch._add_batch_dim(values, 0, level), level


def gather_vmap(value: Tensor, level: int, size: int) -> Tensor:
    """The values of all members of a level that `open_vmap` opened, `... -> size ...`."""
    return _functorch._remove_batch_dim(value, level, size, 0)


def close_vmap() -> None:
    """Close the level that `open_vmap` opened last."""
    _functorch._vmap_decrement_nesting()


def is_transformed() -> bool:
    """Whether the code runs inside `torch.vmap`, `grad` or another transform of functions.

    There autograd functions with a backward written by hand do not work, and no public call tells.
    """
    return torch._C._are_functorch_transforms_active()


def is_in_backward() -> bool:
    """Whether the calling thread is inside a backward pass, as where a block is recomputed.

    Public hooks see tensors whose gradient arrives; a forward hook has no public way to ask.
    """
    return torch._C._current_graph_task_id() != -1


def storage_key(storage: torch.UntypedStorage) -> int:
    """A number that is this storage's own while it lives.

    `data_ptr()` is public and 0 for tensors without contents, which forecasts are made of.
    """
    return storage._cdata


def is_composed(tensor: Tensor) -> bool:
    """Whether a tensor is made of several, as quantised weights are (packed values and scales).

    Public is only `type(tensor) is not Tensor`, which parameters and plain subclasses are as well.
    """
    return is_traceable_wrapper_subclass(tensor)


def inner_tensors(tensor: Tensor) -> dict[str, Tensor]:
    """The tensors by name that a composed tensor is made of.

    `__tensor_flatten__` is the protocol that every such class follows; torch has no call for it.
    """
    composed: Any = tensor
    names, _ = composed.__tensor_flatten__()
    return {name: part for name in names if (part := getattr(tensor, name, None)) is not None}


def is_sharded(tensor: Tensor) -> bool:
    """Whether a process holds a part of it only (FSDP2, tensor parallelism).

    The class is public; importing it takes a second, and who shards has done so.
    """
    made = sys.modules.get("torch.distributed.tensor")
    return made is not None and isinstance(tensor, made.DTensor)


def gather_shards(tensor: Any) -> Tensor:
    """The whole of a sharded tensor; all processes that hold a part must ask for it."""
    return tensor.full_tensor()


def read_whole(tensor: Tensor) -> Tensor:
    """A tensor, put together where a process holds a part of it only (`gather_shards`)."""
    return gather_shards(tensor) if is_sharded(tensor) else tensor


def is_sharded_module(module: nn.Module) -> bool:
    """Whether FSDP2 puts a module's weights together before it runs, and apart afterwards.

    Its class is public; importing it takes a second, and who shards has done so.
    """
    made = sys.modules.get("torch.distributed.fsdp")
    return made is not None and isinstance(module, made.FSDPModule)


def sharded_modules(model: nn.Module) -> list[Any]:
    """All modules of a model that are such."""
    return [module for module in model.modules() if is_sharded_module(module)]


def names_of_sharded(module: nn.Module) -> list[str]:
    """Names of tensors of which a process holds a part only, as `DistributedDataParallel` knows them.

    It exchanges all tensors of a module when it is made, and cannot do so with these; it leaves out those
    in an attribute of the module, for which there is no public name (`Tuned`).
    """
    named = (*module.named_parameters(), *module.named_buffers())
    return [name for name, tensor in named if is_sharded(tensor)]


def kept_buffers(module: nn.Module) -> set[str]:
    """Names of the module's own buffers that files keep.

    `state_dict` is public, and runs hooks of libraries that give it other names.
    """
    return set(module._buffers) - module._non_persistent_buffers_set


def own_registers(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The dictionaries of a module's own parameters, buffers and children themselves.

    The public iterators make names and look for doubles, which is too dear for every forward.
    """
    return module._parameters, module._buffers, module._modules


def counts_versions(tensor: Tensor) -> bool:
    """Whether torch counts what is written to a tensor, and this process holds it whole."""
    return not (tensor.is_inference() or tensor.is_meta or is_sharded(tensor))


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to in place, where torch counts it."""
    return tensor._version


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers, and not a shape alone."""
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)


def local_part(tensor: Any) -> Tensor:
    """What this process holds of a sharded tensor."""
    return tensor.to_local()


def computed_from_others(
    module: nn.Module,
) -> dict[str, tuple[Callable[[], Tensor], tuple[str, ...]]]:
    """Tensors that a module computes from others before it uses them, and the names of those.

    Parametrisations are public; the older `weight_norm` and `spectral_norm` leave a hook that alone
    knows how.
    """
    made: dict[str, tuple[Callable[[], Tensor], tuple[str, ...]]] = {}
    for hook in module._forward_pre_hooks.values():
        name, compute = getattr(hook, "name", None), getattr(hook, "compute_weight", None)
        if not isinstance(name, str) or compute is None:
            continue
        # `spectral_norm` would go on with its iteration, in training and here.
        more = {"do_power_iteration": False} if hasattr(module, f"{name}_orig") else {}
        parts = tuple(f"{name}_{end}" for end in ("g", "v", "orig", "u"))
        made[name] = (lambda c=compute, m=more: c(module, **m).detach()), (*parts, name)
    if parametrize.is_parametrized(module):
        parametrizations: Any = module.parametrizations
        for name in parametrizations:
            made[name] = (lambda n=name: getattr(module, n).detach()), ()
    return made


def wrapped_module(wrapper: CheckpointWrapper) -> nn.Module:
    """The module inside a `CheckpointWrapper`, which has no public name."""
    return wrapper._checkpoint_wrapped_module


def remove_hooks(module: nn.Module, chosen: Callable[[Any], bool]) -> None:
    """Remove the forward hooks of one module that a function chooses.

    The public way is the handle that registering returned. A module that was copied or unpickled has
    copies of the hooks, for which there are no handles.

    Args:
        module: Its children are left alone.
        chosen: Whether a hook goes.
    """
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if chosen(hook):
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_with_kwargs.pop(key, None)


def tree_leaves(value: Any) -> list[Any]:
    """Everything in nested tuples, lists and dictionaries, in order; torch keeps its trees private."""
    return _pytree.tree_leaves(value)


def tree_map(function: Callable[[Any], Any], value: Any) -> Any:
    """The same nesting with a function of every leaf; torch keeps its trees private."""
    return _pytree.tree_map(function, value)


def operation_of(call: Any) -> Any:
    """The operation that a dispatched call is an overload of: a key of torch's own table of flops."""
    return call._overloadpacket


def operation_name(call: Any) -> str:
    """The name of a dispatched call, as `aten::add`; its public `str` has the overload in it."""
    return call._schema.name


def writes_in_place(call: Any) -> bool:
    """Whether a dispatched call changes one of its arguments; only its schema knows."""
    return call._schema.is_mutable


def is_gradient_switch(function: Any) -> bool:
    """Whether a function that a `TorchFunctionMode` sees is what `torch.no_grad()` calls.

    The public `torch.set_grad_enabled` is a class around it, which such a mode never sees.
    """
    return function is torch._C._set_grad_enabled
