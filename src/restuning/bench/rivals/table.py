"""The table of rivals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from restuning._errors import UnknownNameError
from restuning.backbones import Backbone
from restuning.bench.rivals import inside
from restuning.host import Host

Options = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Rival:
    """One row.

    Attributes:
        build: `(host, backbone, classes, options) -> module` with `.task` and `.host`.
        what: One line.
        source: Where its defaults come from.
        takes: Options it knows.
    """

    build: Callable[[Host, Backbone, int, Options], nn.Module]
    what: str
    source: str
    takes: tuple[str, ...] = ()


def build(name: str, host: Host, backbone: Backbone, num_classes: int, **options: Any) -> nn.Module:
    """A rival by name, with a new head: a module with `.task` (what is trained) and `.host`.

    Args:
        name: A name of `RIVALS`.
        host: On the backbone, whose readout is used; left as it is.
        backbone: What the host is on.
        num_classes: Width of the head.
        options: Of the rival, see its row.

    Raises:
        UnknownNameError: No such rival or option.
        MissingExtraError: Its library is not installed.
    """
    if name not in RIVALS:
        raise UnknownNameError("no such rival", where=name, fix=f"one of: {', '.join(RIVALS)}")
    row = RIVALS[name]
    unknown = options.keys() - set(row.takes)
    if unknown:
        raise UnknownNameError(
            "no such option", where=", ".join(sorted(unknown)),
            fix=f"{name} takes {', '.join(row.takes) or 'none'}",
        )  # fmt: skip
    return row.build(host, backbone, num_classes, options)


def _inside(change: Callable[[nn.Module, Options], nn.Module]) -> Callable[..., nn.Module]:
    """A rival made by changing a copy of the backbone's modules."""

    def make(host: Host, backbone: Backbone, classes: int, options: Options) -> nn.Module:
        device = next(host.model.parameters()).device
        model = change(inside.copied(host), options)
        head = inside.fresh_head(host.dim, classes).to(device)
        example = tuple(x.to(device) for x in backbone.example)
        return inside.Inside(model.to(device), example, head)

    return make


RIVALS: dict[str, Rival] = {
    "lora": Rival(
        _inside(inside.lora), "LoRA r 8 on qkv, through PEFT", "Hu et al. 2022; PEFT's defaults",
        ("rank", "alpha", "targets"),
    ),
}  # fmt: skip
