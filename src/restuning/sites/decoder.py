"""Stages of a decoder on maps: the mid and up blocks of a UNet, found by their grids.

Modules that hold blocks and run one after the other return maps whose grid shrinks and grows
again. The decoder begins at the last map of the smallest grid. A stage's output is a tap: it is the
stream after skip connections and upsampling, which no block's output need be.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from restuning.sites.site import Site


@dataclass(frozen=True)
class Held:
    """What a module that may be a stage returned.

    Attributes:
        path: Of the module.
        map: Its first output, `b d h w`.
    """

    path: str
    map: Tensor


def stage_paths(model: nn.Module) -> set[str]:
    """Children of the model, and members of its lists."""
    paths: set[str] = set()
    for name, child in model.named_children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            paths |= {f"{name}.{member}" for member, _ in child.named_children()}
        else:
            paths.add(name)
    return paths


def decoder_stages(ran: list[Held], layers: list[Site]) -> list[Site]:
    """The stages as sites; none where no grid grows.

    Args:
        ran: In the order of the forward.
        layers: Block sites, numbered.
    """
    inside = {h.path: [s for s in layers if s.module.startswith(f"{h.path}.")] for h in ran}
    held = [h for h in ran if inside[h.path] and h.map.dim() == 4]
    sizes = [h.map.shape[-2] * h.map.shape[-1] for h in held]
    if len(held) < 3 or sizes[-1] == min(sizes):
        return []
    bottom = len(sizes) - 1 - sizes[::-1].index(min(sizes))
    return [
        Site(
            f"stage.{number}", "stage", inside[h.path][-1].layer, h.map.shape[1], h.path, h.path,
            h.path, layout="b d h w", changes=True, proof="shape",
        )
        for number, h in enumerate(held[bottom:], 1)
    ]  # fmt: skip
