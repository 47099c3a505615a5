"""What a backbone computes with: its tensors, by the names that files know them by.

A wrapper changes names and not what is computed, and some hide a tensor that is computed from others:
names here are those of the bare model, and values those that its forward uses. Known are `torch.compile`,
DDP, activation checkpoints, FSDP2 and tensor parallelism (sharded tensors), parametrisations and
`weight_norm`, PEFT and adapters that PEFT put inside, weights of several packed parts (torchao,
bitsandbytes), and weights that Accelerate keeps elsewhere until their module runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from restuning._torch import (
    CheckpointWrapper,
    computed_from_others,
    gather_shards,
    inner_tensors,
    is_composed,
    is_sharded,
    kept_buffers,
    sharded_modules,
    wrapped_module,
)

Kind = Literal["parameter", "buffer", "made"]
"""Whether it is trained, kept in files, or made anew by the model's own code (a table of positions)."""


@dataclass(frozen=True)
class Weight:
    """A tensor that a backbone computes with.

    Attributes:
        name: In the bare model.
        kind: Parameter, buffer that files keep, or buffer that is made by the model.
        kept: What the module holds: packed, sharded, `meta`, or the tensor itself.
        read: Gives its value, `kept` where that is one.
        module: That holds it.
    """

    name: str
    kind: Kind
    kept: Tensor
    read: Callable[[], Tensor]
    module: nn.Module

    @classmethod
    def kept_in(cls, module: nn.Module, leaf: str, name: str, kind: Kind, kept: Tensor) -> Weight:
        """A tensor that a module holds under a name of its own, `leaf`."""
        return cls(name, kind, kept, lambda: _read(module, leaf), module)

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """A quantised weight's packed values and scales by name; a plain tensor as it is."""
        value = self.read()
        yield from _parts(self.name, value)
        # bitsandbytes keeps scales as attributes of its packed weights, and 8-bit maps take them over
        # in their first forward.
        state = getattr(value, "quant_state", None)
        scales = getattr(value, "SCB", None)
        if scales is None:
            scales = getattr(getattr(self.module, "state", None), "SCB", None)
        beside = {"SCB": scales} if state is None else state.as_dict()
        for part, number in beside.items():
            if isinstance(number, Tensor | float):
                yield f"{self.name}.{part}", torch.as_tensor(number)


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if not is_composed(tensor):
        yield name, tensor
        return
    for part, inner in inner_tensors(tensor).items():
        yield from _parts(f"{name}.{part}", inner)


@dataclass(frozen=True)
class Contents:
    """All that a backbone computes with, in the order of its modules.

    Attributes:
        weights: Every tensor under its first name.
        modules: By name in the bare model; those inside of adapters and wrappers are left out.
        adapters: What stands beside the tensors: which adapters of a layer are in use, at what scale.
        shared: Second names of tensors, and the first.
    """

    weights: tuple[Weight, ...]
    modules: Mapping[str, nn.Module]
    adapters: Mapping[str, str]
    shared: Mapping[str, str]


def list_contents(model: nn.Module, *, merged: bool = False) -> Contents:
    """Look through a backbone; nothing is read of its tensors.

    Args:
        model: The backbone.
        merged: A weight beside which LoRA is in use is what it would be with that merged into it, and
            the adapter is not listed; of other adapters nothing is known but their own tensors.
    """
    walk = _Walk(merged)
    walk.enter(model, "")
    if is_offloaded(model):
        # One tensor under two names is two on `meta`: the second is no parameter of its own.
        tied: Any = getattr(unwrap(model), "all_tied_weights_keys", {})
        for name, first in dict(tied).items() if isinstance(tied, Mapping) else ():
            if first in walk.weights and walk.weights.pop(name, None) is not None:
                walk.shared[name] = first
    return Contents(tuple(walk.weights.values()), walk.modules, walk.adapters, walk.shared)


class _Walk:
    def __init__(self, merged: bool) -> None:
        self.merged = merged
        self.weights: dict[str, Weight] = {}
        self.modules: dict[str, nn.Module] = {}
        self.adapters: dict[str, str] = {}
        self.shared: dict[str, str] = {}
        self._first: dict[int, str] = {}
        # A tensor that is made when it is read must not give its number to the next.
        self._alive: list[Tensor] = []
        self._seen: set[int] = set()

    def enter(self, module: nn.Module, name: str) -> None:
        module = unwrap(module)
        if id(module) in self._seen:
            return
        self._seen.add(id(module))
        if (layer := _AdaptedLayer.of(module)) is not None:
            self.enter(layer.base, name)
            if not (self.merged and self._put_merged(layer, name)):
                self._enter_adapters(layer, name)
            return
        self.modules[name] = module
        self._take_own(module, name)
        for child_name, child in module.named_children():
            if not (child_name == "parametrizations" and parametrize.is_parametrized(module)):
                self.enter(child, _join(name, child_name))

    def _put_merged(self, layer: _AdaptedLayer, name: str) -> bool:
        """Put a base's weight down as it would be with its adapters in it, if that is all there is to them."""
        base, path = unwrap(layer.base), _join(name, "weight")
        weight, product = self.weights.get(path), layer.product()
        if product is None or weight is None or weight.module is not base:
            return False
        self.weights[path] = Weight(path, weight.kind, weight.kept, product, base)
        return True

    def _enter_adapters(self, layer: _AdaptedLayer, name: str) -> None:
        for path, module in layer.used():
            self.enter(module, _join(name, path))
        for path, parameter in layer.used_parameters():
            here, read = _join(name, path), lambda p=parameter: p
            self._take(Weight(here, "parameter", parameter, read, layer.module))
        if settings := layer.settings():
            self.adapters[name] = settings

    def _take_own(self, module: nn.Module, name: str) -> None:
        hidden: set[str] = set()
        for leaf, (compute, parts) in computed_from_others(module).items():
            name_here = _join(name, leaf)
            self._take(Weight(name_here, "parameter", compute(), compute, module))
            hidden |= set(parts)
        for leaf, parameter in module.named_parameters(recurse=False):
            if leaf not in hidden:
                self._take(Weight.kept_in(module, leaf, _join(name, leaf), "parameter", parameter))
        kept = kept_buffers(module)
        for leaf, buffer in module.named_buffers(recurse=False):
            if leaf not in hidden:
                kind: Kind = "buffer" if leaf in kept else "made"
                self._take(Weight.kept_in(module, leaf, _join(name, leaf), kind, buffer))

    def _take(self, weight: Weight) -> None:
        if not weight.kept.numel():
            return
        self._alive.append(weight.kept)
        first = self._first.setdefault(id(weight.kept), weight.name)
        if first == weight.name:
            self.weights[first] = weight
        else:
            self.shared[weight.name] = first


def reshard(model: nn.Module) -> None:
    """Let modules of FSDP2 hold their shards again, as before a forward.

    The outermost keeps whole weights after a forward, in the type that it computes in.
    """
    for module in sharded_modules(model):
        module.reshard()


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside of wrappers that compute nothing of their own."""
    while True:
        inner = _inside(module)
        if inner is None:
            return module
        module = inner


def _inside(module: nn.Module) -> nn.Module | None:
    if isinstance(module, CheckpointWrapper):
        return wrapped_module(module)
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return module.module
    children = dict(module.named_children())
    if children.keys() == {"_orig_mod"}:
        return children["_orig_mod"]
    # PEFT's two wrappers around a model; one with a prompt encoder or the like computes with it.
    for inside, sign in (("base_model", "get_base_model"), ("model", "inject_adapter")):
        if children.keys() == {inside} and hasattr(module, sign) and hasattr(module, "peft_config"):
            return children[inside]
    return None


def class_name(model: nn.Module) -> str:
    """The name of a model's own class, without wrappers and without classes that were made for it."""
    model = unwrap(model)
    if (layer := _AdaptedLayer.of(model)) is not None:
        model = unwrap(layer.base)
    kind = type(model)
    # FSDP2 and parametrisations give a module a class of its own, beside or below its real one.
    while kind.__name__ != (real := _real_class(kind)).__name__:
        kind = real
    return kind.__name__


def _real_class(kind: type) -> type:
    for prefix in ("FSDP", "Parametrized"):
        for base in kind.__bases__:
            if kind.__name__ == f"{prefix}{base.__name__}":
                return base
    return kind


class _AdaptedLayer:
    """A layer with adapters that PEFT put around it, known by what it looks like: no library is asked."""

    def __init__(self, module: Any, base: nn.Module) -> None:
        self.module, self.base = module, base
        off = bool(getattr(module, "disable_adapters", False))
        active = getattr(module, "active_adapters", None)
        active = getattr(module, "active_adapter", ()) if active is None else active
        active = [active] if isinstance(active, str) else list(active or ())
        self.merged = list(getattr(module, "merged_adapters", ()))
        # What is merged is in the base's weight; what is switched off computes nothing.
        self.active = [] if off or self.merged else active
        # Merged and switched off, the next forward takes it out of the base's weight again.
        self.leaves = off and bool(self.merged)

    @classmethod
    def of(cls, module: nn.Module) -> _AdaptedLayer | None:
        children = dict(module.named_children())
        if "base_layer" in children and hasattr(module, "adapter_layer_names"):
            return cls(module, children["base_layer"])
        # A copy of a whole module that is trained in its place.
        if {"original_module", "modules_to_save"} <= children.keys():
            layer: Any = cls(module, children["original_module"])
            copies: Any = children["modules_to_save"]
            used = [name for name in layer.active if name in copies]
            if used:
                layer.base, layer.active = copies[used[0]], []
            return layer
        return None

    def used(self) -> Iterator[tuple[str, nn.Module]]:
        """Modules of the adapters in use, by their path in the layer."""
        for kind, holder in self._holders(nn.ModuleDict):
            yield from ((f"{kind}.{name}", holder[name]) for name in self.active if name in holder)

    def used_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters of the adapters in use that stand in no module."""
        for kind, holder in self._holders(nn.ParameterDict):
            yield from ((f"{kind}.{name}", holder[name]) for name in self.active if name in holder)

    def product(self) -> Callable[[], Tensor] | None:
        """Gives the base's weight with the adapters in use merged into it, as PEFT does, to the bit.

        None where none is in use, or where that is not all that is computed (DoRA, a bias, other kinds).
        """
        layer = self.module
        used = [n for n in self.active if n in getattr(layer, "lora_A", ())]
        weight = getattr(self.base, "weight", None)
        if not used or not isinstance(weight, Tensor) or not weight.is_floating_point():
            return None
        if weight.is_meta or is_composed(weight) or is_sharded(weight):
            return None
        # A layer of another kind has no such method; variants and biases are more than a product.
        more = (getattr(layer, "lora_variant", {}), getattr(layer, "use_dora", {}))
        biases = getattr(layer, "lora_bias", {})
        if (
            not hasattr(layer, "get_delta_weight")
            or any(each.get(n) for each in (*more, biases) for n in used)
            or getattr(self.base, "groups", 1) > 1
        ):
            return None

        def merge() -> Tensor:
            with torch.no_grad():
                value = weight.detach().clone()
                for name in used:
                    value += layer.get_delta_weight(name)
                return value

        return merge

    def _holders(self, of: type) -> Iterator[tuple[str, Any]]:
        for kind in getattr(self.module, "adapter_layer_names", ()):
            if isinstance(holder := getattr(self.module, kind, None), of):
                yield kind, holder

    def settings(self) -> str:
        """The adapters in use and their scales, in words."""
        scaling = getattr(self.module, "scaling", {})
        own = {n: scaling.get(n) if isinstance(scaling, dict) else scaling for n in self.active}
        words = [f"{name} at {scale}" for name, scale in own.items()]
        words += [f"{name} leaves" for name in self.merged if self.leaves]
        return ", ".join(words)


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is a layer with adapters."""
    return _AdaptedLayer.of(module) is not None


def adapter_state(module: Any) -> tuple[Any, ...]:
    """What is switched, merged and scaled in a layer with adapters, to be compared.

    Read off the layer's own attributes: cheap enough for every forward.
    """
    active = getattr(module, "active_adapter", None)
    scaling = getattr(module, "scaling", None)
    return (
        getattr(module, "disable_adapters", None),
        tuple(active) if isinstance(active, list) else active,
        tuple(getattr(module, "merged_adapters", ())),
        tuple(scaling.items()) if isinstance(scaling, dict) else scaling,
    )


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def is_offloaded(model: nn.Module) -> bool:
    """Whether weights are kept elsewhere until a module runs (Accelerate's hooks bring them)."""
    return any(
        bool(hooks_of_accelerate(module))
        and any(p.is_meta for p in module.parameters(recurse=False))
        for module in model.modules()
    )


def is_shared_out(model: nn.Module) -> bool:
    """Whether processes hold parts of it: each forward is then one that all of them make together."""
    return bool(sharded_modules(model)) or any(map(is_sharded, model.parameters()))


def hooks_of_accelerate(module: nn.Module) -> list[Any]:
    """Accelerate's hooks on a module."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def _read(module: nn.Module, leaf: str) -> Tensor:
    """A tensor, from where it is kept until its module runs, whole also where it is sharded."""
    value: Any = getattr(module, leaf)
    if value.is_meta:
        for hook in hooks_of_accelerate(module):
            if getattr(hook, "weights_map", None) is not None:
                return hook.weights_map[leaf]
    return gather_shards(value) if is_sharded(value) else value
