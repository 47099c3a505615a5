"""The table of rivals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from restuning._errors import UnknownNameError
from restuning.backbones import Backbone
from restuning.bench.rivals import beside, convpass, inside, swift
from restuning.host import Host
from restuning.methods import check_values, new_head
from restuning.task import Task, Tuned

Options = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Rival:
    """One row.

    Attributes:
        build: `(host, backbone, classes, options) -> module` with `.task` and `.host`.
        what: One line.
        source: Where its defaults come from.
        takes: Options it knows.
        inside: Whether it changes what the backbone computes; else it only reads that.
    """

    build: Callable[[Host, Backbone, int, Options], nn.Module]
    what: str
    source: str
    takes: tuple[str, ...] = ()
    inside: bool = True


def build(name: str, host: Host, backbone: Backbone, num_classes: int, **options: Any) -> nn.Module:
    """A rival by name, with a new head: a module with `.task` (what is trained) and `.host`.

    Args:
        name: A name of `RIVALS`.
        host: On the backbone, whose readout is used; left as it is.
        backbone: What the host is on.
        num_classes: Width of the head.
        options: Of the rival, see its row.

    Raises:
        UnknownNameError: No such rival, option or value.
        MissingExtraError: Its library is not installed.
    """
    check(name, options)
    return RIVALS[name].build(host, backbone, num_classes, options)


def check(name: str, options: Mapping[str, Any]) -> None:
    """Refuse a rival, an option or a value that there is not, before anything is loaded for it.

    Raises:
        UnknownNameError: It says which.
    """
    if name not in RIVALS:
        raise UnknownNameError("no such rival", where=name, fix=f"one of: {', '.join(RIVALS)}")
    row = RIVALS[name]
    unknown = options.keys() - set(row.takes)
    if unknown:
        raise UnknownNameError(
            "no such option",
            where=", ".join(sorted(unknown)),
            fix=f"{name} takes {', '.join(row.takes) or 'none'}",
        )
    # PEFT is told names of modules, where methods are told roles.
    check_values({option: value for option, value in options.items() if option != "targets"})


def _inside(change: Callable[[nn.Module, Host, Options], nn.Module]) -> Callable[..., nn.Module]:
    """A rival made by changing a copy of the backbone's modules."""

    def make(host: Host, backbone: Backbone, classes: int, options: Options) -> nn.Module:
        device = next(host.model.parameters()).device
        model = change(inside.copy_backbone(host), host, options)
        head = new_head(host.dim, classes).to(device)
        # A new host is made on the changed copy, which proves its sites on this input.
        example = tuple(x.to(device) for x in backbone.example)
        return inside.Inside(model.to(device), example, head)

    return make


def _beside(make: Callable[[Host, int, Options], nn.Module]) -> Callable[..., nn.Module]:
    """A rival that leaves the backbone alone; a task is put on the host as methods are."""

    def build_task(host: Host, backbone: Backbone, classes: int, options: Options) -> nn.Module:
        device = next(host.model.parameters()).device
        rival = make(host, classes, options).to(device)
        # A ladder is a task like ours; the others are modules with a forward of their own.
        return Tuned(host, rival) if isinstance(rival, Task) else rival

    return build_task


RIVALS: dict[str, Rival] = {
    "peft-lora": Rival(
        _inside(inside.inject_lora),
        "LoRA r 8 on qkv through PEFT, which the method lora is equal to",
        "Hu et al. 2022; PEFT's defaults",
        ("rank", "alpha", "targets"),
    ),
    "ssf": Rival(
        _inside(inside.insert_ssf),
        "SSF: a scale and a shift after every map and norm",
        "Lian et al. 2022, arXiv 2210.08823",
    ),
    "convpass": Rival(
        _inside(convpass.convpass),
        "Convpass: a convolutional bottleneck beside MHA and FFN",
        "Jie and Deng 2022, arXiv 2207.07039",
        ("rank", "scale", "prefix"),
    ),
    "side-tuning": Rival(
        _beside(beside.build_side_tuning),
        "Side-Tuning: AlexNet beside the backbone, blended",
        "Zhang et al. 2020, arXiv 1912.13503; sizes as in VPT's code",
        ("pretrained",),
        inside=False,
    ),
    "lst": Rival(
        _beside(beside.build_ladder),
        "LST: a small transformer on all taps, no gradient in the backbone",
        "Sung et al. 2022, arXiv 2206.06522",
        ("reduction",),
        inside=False,
    ),
    "ms-swift": Rival(
        _beside(swift.swift),
        "the authors' bypass in ms-swift (adapters of length 32)",
        "ms-swift's documentation",
        inside=False,
    ),
    "res-tuning-after-norm": Rival(
        _inside(inside.tune_after_the_norm),
        "res-tuning whose tuners read after the norm (ablation)",
        "Jiang et al. 2023, arXiv 2310.19859, but for where it reads",
        ("rank", "layers"),
    ),
}
