"""LoRA at linear sites: made for a site, and taken up into the weights of a copy of the backbone."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from restuning._errors import WrongTaskError
from restuning._torch import is_sharded
from restuning.host import Host
from restuning.sites import LinearSite
from restuning.task.blend import Blend, weighted_members
from restuning.task.task import Task
from restuning.tuners import ConvLora, DropPath, Lora, Tuner


def lora_beside(site: LinearSite, **settings: Any) -> Lora | ConvLora:
    """LoRA of a site's widths; beside a convolution with its kernel.

    Args:
        site: Where it will stand.
        settings: `rank`, `alpha`, `rslora`, `dropout`, `zero`; see `Lora`.

    Raises:
        TunerShapeError: The rank is no multiple of a convolution's groups.
    """
    if site.kind == "linear":
        return Lora(site.dim_in, site.dim, **settings)
    return ConvLora(
        site.dim_in,
        site.dim,
        kernel=site.kernel,
        stride=site.stride,
        padding=site.padding,
        groups=site.groups,
        **settings,
    )


def merge(task: Task | Blend, host: Host) -> nn.Module:
    """A copy of the backbone whose weights have taken up a task: `W + s B A` where it had W.

    It computes what the task did, to rounding, without a tuner. The backbone itself is not touched, and the
    copy has no hooks. A task's head stays with the task: it reads the copy's feature as it read the host's.

    Args:
        task: Of LoRA alone; or a blend of such tasks.
        host: The host it belongs to.

    Raises:
        WrongTaskError: Something of it cannot be taken up: another tuner, trained copies, a side network,
            weights that are packed, computed from others (weight norm) or shared with another module, a
            convolution of several groups.

    Cost: the memory of the backbone once more.
    """
    if task.side is not None or len(getattr(task, "weights", ())):
        raise _refusal("a side network or trained copies of weights", "keep it as a task")
    deltas: list[tuple[LinearSite, Tensor]] = []
    shared = _shared_weights(host.model)
    for name, tuner in task.inline_tuners.items():
        site = host.sites.linear.get(name)
        # Before its product is made: that of several groups is none.
        if site is not None and site.groups > 1:
            raise _refusal(f"{site.module} has {site.groups} groups", "leave it out (targets=conv)")
        delta = None if site is None else _delta(tuner)
        if site is None or delta is None:
            raise _refusal(
                f"{tuner.kind} at {name}, which is no product that a linear map could take up",
                "keep it as a task: tuners beside whole operations have no weight to go into",
            )
        module: Any = host.model.get_submodule(site.module)
        # Of a parametrization or a norm: what is written into it is computed anew, and lost.
        if "weight" not in module._parameters:
            raise _refusal(
                f"the weight of {site.module} is computed from other parameters (weight norm, spectral norm, "
                "a parametrization)",
                "make a plain one of it first (torch.nn.utils.parametrize.remove_parametrizations, "
                "remove_weight_norm, remove_spectral_norm)",
            )
        packed = site.kind == "linear" and site.proof != "product"
        if packed or module.weight.is_meta:
            raise _refusal(f"the weight of {site.module} is packed or not there", "merge into fp32")
        if is_sharded(module.weight):
            raise _refusal(
                f"the weight of {site.module} is shared out among processes",
                "save the task, and merge it into the backbone in one process",
            )
        if id(module.weight) in shared:
            raise _refusal(f"the weight of {site.module} is another module's too", "untie it first")
        deltas.append((site, delta))
    # With the host, whose hooks hold references into the model; released, the copy has none.
    twin = copy.deepcopy(host)
    twin.release()
    with torch.no_grad():
        for site, delta in deltas:
            module = twin.model.get_submodule(site.module)
            part = _rows_of(module, site)
            # In the wider of the two, and rounded once.
            wanted = (part + delta.to(part.device)).to(part.dtype)
            part.copy_(wanted)
            # Read off the module again: whatever stands behind its weight, the task is in it.
            if not torch.equal(_rows_of(module, site), wanted):
                raise _refusal(
                    f"the weight of {site.module} is not what was written to it (or is not finite)",
                    "keep it as a task",
                )
    return twin.model


def _rows_of(module: Any, site: LinearSite) -> Tensor:
    """The rows of a map's weight that a site adds to."""
    # GPT-2 keeps its weights turned.
    turned = site.kind == "linear" and not isinstance(module, nn.Linear)
    rows = module.weight.t() if turned else module.weight
    return rows[site.start : site.start + site.dim] if site.part else rows


def _delta(tuner: Tuner) -> Tensor | None:
    """What a tuner adds to a map's weight, `out in ...`; None where it is no such product."""
    if isinstance(tuner, Lora | ConvLora):
        a, b = tuner.a.weight, tuner.b.weight
        assert isinstance(a, Tensor) and isinstance(b, Tensor)
        product = b.detach().flatten(1) @ a.detach().flatten(1)
        return tuner.factor * product.unflatten(1, a.shape[1:])
    if isinstance(tuner, DropPath):
        return _delta(tuner.tuner)
    parts = [(_delta(each), weight) for each, weight in weighted_members(tuner)]
    known = [weight * delta for delta, weight in parts if delta is not None]
    return sum(known[1:], known[0]) if known and len(known) == len(parts) else None


def _shared_weights(model: nn.Module) -> set[int]:
    """Parameters that more than one module holds."""
    held = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    return {number for number, times in held.items() if times > 1}


def _refusal(found: str, fix: str) -> WrongTaskError:
    return WrongTaskError(
        "a task cannot be merged into the backbone's weights", found=found, fix=fix
    )
