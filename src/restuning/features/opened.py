"""A frozen backbone on its device, for a pass over data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from restuning.backbones import Backbone, choose_device, take_backbone
from restuning.host import Extractor


@contextmanager
def open_backbone(
    backbone: str | Backbone,
    weights: str | Path | None,
    random: bool,
    device: str | torch.device | None,
) -> Iterator[tuple[Extractor, Backbone]]:
    """A backbone by name, or one that is loaded, and its host; inside, the device is the current one.

    Raises:
        RestuningError: Names, weights or the device are not what they should be.
    """
    # Random weights are those of seed 0, as where `train` is given none.
    torch.manual_seed(0)
    backbone = take_backbone(backbone, weights=weights, random=random)
    host, place = backbone.host(), choose_device(device)
    # Kernels without a device of their own, as of quantised weights, go to the current one.
    with torch.cuda.device(place) if place.type == "cuda" else nullcontext():
        host.to(place)
        yield host, backbone
