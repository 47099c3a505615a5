"""Rivals beside the backbone, which stays as it is and gets no gradient: Side-Tuning and LST."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from restuning._errors import NoSitesError, require
from restuning.bypass import SideNetwork, side_network
from restuning.host import Host
from restuning.methods import new_head
from restuning.sites import Needs, resolve_tokens
from restuning.task import Task

LADDER_REDUCTION = 8
"""Width of the backbone over that of the side network (Sung et al. 2022, section 4.1)."""

TEMPERATURE = 0.1
"""Temperature of the gates' sigmoid (Sung et al. 2022, section 3.2)."""

ALEXNET = 9216
"""Values of AlexNet's 6 x 6 last map of 256 channels."""

SMALLEST = 64
"""Pixels that AlexNet's three poolings need; smaller images are enlarged for it."""


def build_alexnet() -> nn.Sequential:
    """The convolutions of AlexNet (Krizhevsky 2014, as torchvision has them), `b 3 h w -> b 9216`."""
    pool = nn.MaxPool2d(3, 2)
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2),
        nn.ReLU(),
        pool,
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        pool,
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
        pool,
        nn.AdaptiveAvgPool2d(6),
        nn.Flatten(),
    )


class Side(nn.Module):
    """What Side-Tuning trains: a network on the image, its map to the feature's width, a blend.

    Args:
        network: `b 3 h w -> b 9216`.
        dim: Width of the feature.
        head: On the blend.
    """

    def __init__(self, network: nn.Module, dim: int, head: nn.Linear) -> None:
        super().__init__()
        self.network, self.head = network, head
        self.projection = nn.Linear(ALEXNET, dim, bias=False)
        # sigmoid(0): an even blend at the start, as in Side-Tuning.
        self.alpha = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, feature: Tensor) -> Tensor:
        """Logits of `sigmoid(alpha) feature + (1 - sigmoid(alpha)) side(x)`."""
        alpha = torch.sigmoid(self.alpha)
        # Its poolings would leave a map of no pixels.
        if min(x.shape[-2:]) < SMALLEST:
            x = F.interpolate(x, (SMALLEST, SMALLEST), mode="bilinear")
        return self.head(alpha * feature + (1 - alpha) * self.projection(self.network(x)))


class SideTuned(nn.Module):
    """A frozen backbone and a side network on the same images, `b 3 h w -> b c`."""

    def __init__(self, host: Host, task: Side) -> None:
        super().__init__()
        self.host, self.task = host, task
        self.needs = Needs(("last",), resolve_tokens(host.readout_rule.pool))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images."""
        # Without gradient: Side-Tuning trains beside the backbone, not in it.
        features = self.host.features(x, keep=self.needs)
        return self.task(x, self.host.readout(features["last"]).detach())


def build_side_tuning(host: Host, classes: int, options: dict[str, Any]) -> nn.Module:
    """Side-Tuning (Zhang et al. 2020, arXiv 1912.13503) as VPT's code has it for ViT.

    AlexNet's convolutions (2,469,696 parameters) and a 9216 x d map without bias, blended by one
    number: on ViT-B/16 with the mean head of VTAB-1K 9,585,630 parameters, printed as 9.59 M.
    VPT starts AlexNet from ImageNet weights: option `pretrained=true` (torchvision and its hub);
    without it the start is random, and results are those of a random start.
    """
    network = build_alexnet()
    if options.get("pretrained", False):
        models = require("torchvision.models", "transformers", "AlexNet's weights")
        weights = models.alexnet(weights="DEFAULT").features.state_dict()
        network.load_state_dict(weights)
    return SideTuned(host, Side(network, host.dim, new_head(host.dim, classes)))


class LadderBlock(nn.Module):
    """A pre-norm transformer layer of a small width, `b n w -> b n w`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attention, then FFN."""
        # `b n (3 h e)` to three of `b h n e`.
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.proj(mixed)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


@side_network("ladder")
class Ladder(SideNetwork):
    """`h_l = B_l(mu_l D_l x_l + (1 - mu_l) h_(l-1))`, `mu_l = sigmoid(alpha_l / 0.1)`, then up.

    It reads all tokens of all taps, and its state is read by the backbone's frozen norm.

    Args:
        taps: Names, the embedding output first.
        dim: Width d of the taps.
        reduction: d over the side network's width w.
        heads: Of its attention.

    Cost: with L layers `(L + 1) (d w + w) + L (12 w^2 + 13 w + 1) + w d + d` parameters. ViT-B/16: 2,376,300
    with reduction 8, the 2.38 M of V-PETL Bench; 856,764 with 16, with heads the 0.93 M
    (CIFAR-100) and 0.89 M (VTAB-1K) of Res-Tuning's own port.
    Departs: Sung et al. start the side network from pruned weights of the backbone; here it starts
    at random (Xavier), as no pruning is published for vision.
    Reference: Sung et al. 2022, arXiv 2206.06522.
    """

    def __init__(self, taps: Sequence[str], dim: int, reduction: int, heads: int) -> None:
        super().__init__()
        self.taps, self.dim, self.reduction, self.heads = tuple(taps), dim, reduction, heads
        width = dim // reduction
        # The backbone's heads need not divide the narrower width.
        heads = heads if width % heads == 0 else 1
        # One for every tap, the embedding output's among them.
        self.down = nn.ModuleList(nn.Linear(dim, width) for _ in taps)
        self.blocks = nn.ModuleList(LadderBlock(width, heads) for _ in taps[1:])
        self.gates = nn.Parameter(torch.zeros(len(taps) - 1))
        self.up = nn.Linear(width, dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def needs(self, pool: str) -> Needs:
        """All tokens of all taps, because its layers attend."""
        return Needs(self.taps, "all")

    def forward(self, taps: Mapping[str, Tensor]) -> Tensor:
        """The state that the readout reads, `b n d`."""
        streams = [taps[name].detach().to(self.up.weight.dtype) for name in self.taps]
        state = self.down[0](streams[0])
        mu = torch.sigmoid(self.gates / TEMPERATURE)
        for place, (block, stream) in enumerate(zip(self.blocks, streams[1:], strict=True)):
            low = self.down[place + 1](stream)
            state = block(mu[place] * low + (1 - mu[place]) * state)
        return self.up(state)


def build_ladder(host: Host, classes: int, options: dict[str, Any]) -> Task:
    """LST: a `Ladder` on all taps. Options: `reduction`.

    Raises:
        NoSitesError: The layers have different widths, or their streams are maps.
    """
    sites = host.sites.pick("block")
    dims = {site.dim for site in sites.values()}
    if len(dims) > 1 or any(site.layout != "b n d" for site in sites.values()):
        raise NoSitesError(
            "a ladder of one width needs streams of one width",
            found=f"widths {sorted(dims)}",
            fix="use res-tuning-bypass, which resamples between stages",
        )
    projections = [
        s.projections for s in host.sites.values() if s.op == "mha" and s.projections is not None
    ]
    heads = projections[0].heads if projections else 1
    side = Ladder(host.sites.taps, dims.pop(), options.get("reduction", LADDER_REDUCTION), heads)
    task = Task(side=side, head=new_head(host.dim, classes), method="lst")
    # As `methods.build` does: a bank reads it from the task.
    task.pool = host.readout_rule.pool
    return task
