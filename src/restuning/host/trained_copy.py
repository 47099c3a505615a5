"""A backbone whose weights are a task's: a copy of its structure, made for one call.

Every module is copied and no tensor is: what is frozen is shared, what is trained is the task's own
tensor. So the backbone is never written, not even for a moment, and any number of threads may run it.
"""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType, NoneType
from typing import Any

import torch
from torch import Tensor, nn

from restuning._errors import BackboneError
from restuning._torch import copy_module, without_compiler

NESTED = 6
"""How deep an attribute of a module is searched for modules: lists in objects, methods in functions."""

PLAIN = frozenset(
    (
        NoneType,
        bool,
        int,
        float,
        complex,
        str,
        bytes,
        type,
        torch.dtype,
        torch.device,
        torch.Size,
        torch.Generator,
        ModuleType,
        BuiltinFunctionType,
    )
)
"""Classes of values that refer to no module."""


def copy_with_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model's structure with some tensors in the place of its own.

    A tensor that stands at several places is replaced at all of them. Parts that were compiled by
    themselves (`+compile`) run as they are written: what was compiled has the weights of then. What is
    compiled around this call has the copy in it.

    Args:
        model: Left as it is, and shared but for the tensors that are replaced.
        weights: By name in the model.

    Raises:
        BackboneError: A part of the model cannot be copied (a scripted module).

    Cost: a walk over all modules and their attributes, and no memory for tensors.
    """
    replaced: dict[int, Tensor] = {}
    for name, weight in weights.items():
        owner, _, leaf = name.rpartition(".")
        replaced[id(getattr(model.get_submodule(owner), leaf))] = weight
    copies: dict[int, nn.Module] = {}
    # All shells first: what refers to a module, wherever it stands, finds its copy.
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise BackboneError(
                "weights of a scripted module cannot be trained",
                where=type(module).__name__,
                fix="build the backbone from Python code, or tune beside it (res-tuning-bypass)",
            )
        copies[id(module)] = object.__new__(type(module))
    for module in model.modules():
        copies[id(module)] = copies[id(without_compiler(module))]
    relink = _Relink(replaced, copies)
    for module in model.modules():
        if without_compiler(module) is module:
            copy_module(module, copies[id(module)], copies, replaced, relink.value)
    return copies[id(model)]


class _Relink:
    """Makes what refers to modules of the original refer to those of the copy.

    Methods that were bound, functions that were put in the place of a `forward`, lists of weights (of
    an LSTM) and objects that hold a module beside the tree. All that leads to no module is shared.

    Args:
        replaced: Tensors by the identity of those they take the place of.
        copies: Modules likewise.
    """

    def __init__(self, replaced: Mapping[int, Tensor], copies: Mapping[int, nn.Module]) -> None:
        self.replaced, self.copies = replaced, copies
        # With the value itself, whose identity must not be given to another meanwhile.
        self.done: dict[int, tuple[Any, Any]] = {}

    def value(self, value: Any, depth: int = 0) -> Any:
        """The value itself, or one that refers to the copy."""
        # Nearly all attributes are numbers and names, and this runs for each in every call.
        if type(value) in PLAIN or depth > NESTED:
            return value
        if isinstance(value, nn.Module):
            return self.copies.get(id(value), value)
        if isinstance(value, Tensor):
            return self.replaced.get(id(value), value)
        if id(value) not in self.done:
            # In a circle a value is what it was.
            self.done[id(value)] = value, value
            self.done[id(value)] = value, self._relink(value, depth + 1)
        return self.done[id(value)][1]

    def _relink(self, value: Any, depth: int) -> Any:
        kind = type(value)
        # Of all containers a list first: other threads may be writing to them.
        if kind in (list, tuple, set):
            own = list(value)
            made = [self.value(each, depth) for each in own]
            return value if _same(made, own) else kind(made)
        if kind in (dict, OrderedDict):
            items = list(value.items())
            made = [(name, self.value(each, depth)) for name, each in items]
            return value if _same([m for _, m in made], [v for _, v in items]) else kind(made)
        if kind is MethodType:
            owner = self.value(value.__self__, depth)
            return value if owner is value.__self__ else MethodType(value.__func__, owner)
        if kind is partial:
            parts = (value.func, value.args, value.keywords)
            made = [self.value(each, depth) for each in parts]
            return value if _same(made, parts) else partial(made[0], *made[1], **made[2])
        if kind is FunctionType:
            return self._function(value, depth)
        if kind is weakref.ReferenceType:
            target = self.copies.get(id(value()))
            return value if target is None else weakref.ref(target)
        if hasattr(value, "__dict__") and not isinstance(value, type):
            made = self.value(vars(value), depth)
            if made is not vars(value):
                other = copy.copy(value)
                vars(other).update(made)
                return other
        return value

    def _function(self, function: FunctionType, depth: int) -> Any:
        """A function that refers to a module from where it was written."""
        cells = function.__closure__ or ()
        made = [self._cell(cell, depth) for cell in cells]
        defaults = self.value(function.__defaults__, depth)
        named = self.value(function.__kwdefaults__, depth)
        if (
            _same(made, cells)
            and defaults is function.__defaults__
            and named is function.__kwdefaults__
        ):
            return function
        other = FunctionType(
            function.__code__, function.__globals__, function.__name__, defaults, tuple(made)
        )
        other.__kwdefaults__ = named
        vars(other).update(self.value(vars(function), depth))
        return other

    def _cell(self, cell: CellType, depth: int) -> CellType:
        try:
            content = cell.cell_contents
        except ValueError:  # Empty yet.
            return cell
        made = self.value(content, depth)
        # A cell that stays is shared: what the function counts in it is counted.
        return cell if made is content else CellType(made)


def _same(ours: Any, theirs: Any) -> bool:
    return all(a is b for a, b in zip(ours, theirs, strict=True))
