"""A backbone is frozen while hosts stand on it; the last of them gives it back as it was."""

from __future__ import annotations

from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from restuning._torch import remove_hooks
from restuning.sites import PACKS_ITSELF, keep_backward


class _Before:
    """What one module was before the first host that stands on it now.

    Attributes:
        training: Its mode.
        trained: Whether each of its own parameters asked for a gradient.
        packs: What `keep_backward` switches off; None where it has nothing to switch.
        hosts: Those that stand on it. One that was deleted without a release leaves by itself.
        slots: Of all of them, also of those that are gone.
    """

    def __init__(self, module: nn.Module) -> None:
        self.training = module.training
        self.trained = {name: p.requires_grad for name, p in module.named_parameters(recurse=False)}
        self.packs = getattr(module, PACKS_ITSELF, None)
        self.hosts: WeakSet[Any] = WeakSet()
        self.slots: set[str] = set()

    def give_back(self, module: nn.Module) -> None:
        module.training = self.training
        for name, parameter in module.named_parameters(recurse=False):
            parameter.requires_grad_(self.trained.get(name, parameter.requires_grad))
        if self.packs is not None:
            setattr(module, PACKS_ITSELF, self.packs)
        remove_hooks(module, lambda hook: getattr(hook, "slot", None) in self.slots)


# By module and not by backbone: two hosts may stand on a model and on a part of it. A copy of a
# frozen backbone is not known here, and stays as it was copied.
_before: WeakKeyDictionary[nn.Module, _Before] = WeakKeyDictionary()
_lock = RLock()


def freeze(model: nn.Module, host: nn.Module, slot: str) -> None:
    """Put a backbone in eval mode without gradients, and remember for a host what it was.

    Args:
        model: The backbone.
        host: Which stands on it from now on.
        slot: Of the host, which its hooks bear.
    """
    with _lock:
        known: dict[nn.Module, _Before] = {}
        for module in model.modules():
            before = _before.get(module)
            # What hosts left that are gone without a release is what this one finds.
            known[module] = before if before is not None and before.hosts else _Before(module)
        # All are asked before any is changed: a shared parameter belongs to several modules.
        for module, before in known.items():
            before.hosts.add(host)
            before.slots.add(slot)
            _before[module] = before
        model.eval().requires_grad_(False)
        keep_backward(model)


def give_back(host: nn.Module) -> None:
    """Make every module again what it was, but those that another host stands on."""
    with _lock:
        for module, before in list(_before.items()):
            if host not in before.hosts:
                continue
            before.hosts.discard(host)
            if not before.hosts:
                del _before[module]
                before.give_back(module)
