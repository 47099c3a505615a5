"""The authors' own code in ms-swift: its bypass, as its documentation builds it for a timm ViT."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from restuning._errors import NoSitesError, require
from restuning.bench.rivals.inside import Within, copy_backbone
from restuning.host import Host
from restuning.methods import new_head


class SwiftModel(nn.Module):
    """A model that ms-swift changed, and a head on what it returns, `b 3 h w -> b c`."""

    def __init__(self, model: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.host = model
        # ms-swift freezes the backbone itself; what still wants gradients is its own.
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.task = Within(trained, head)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images."""
        feature = self.host(x)
        return self.task.head(feature.to(self.task.head.weight.dtype))


def swift(host: Host, classes: int, options: dict[str, Any]) -> nn.Module:
    """ms-swift's ResTuning: adapters of length 32 beside all blocks, no lambda, no channel scale.

    On ViT-B/16 1,198,848 parameters without the head, three times the paper's bypass.

    Raises:
        MissingExtraError: ms-swift is not installed.
        NoSitesError: The backbone is not a timm ViT (ms-swift is told module names by hand).
    """
    tuners = require("swift.tuners", "swift", "the rival ms-swift")
    model: Any = copy_backbone(host)
    if not hasattr(model, "blocks") or not hasattr(model, "norm"):
        raise NoSitesError(
            "ms-swift's example names the modules of a timm ViT",
            where=type(model).__name__,
            fix="give a timm ViT",
        )
    config = tuners.ResTuningConfig(
        dims=host.dim,
        # As its documentation writes them for a ViT.
        root_modules=r".*blocks.0$",
        stem_modules=r".*blocks\.\d+$",
        target_modules=r"norm",
        tuner_cfg="res_adapter",
    )
    return SwiftModel(tuners.Swift.prepare_model(model, config), new_head(host.dim, classes))
