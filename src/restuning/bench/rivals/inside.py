"""Rivals whose weights live inside the backbone: modules of a copy of it are replaced."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from restuning._errors import NoSitesError, require
from restuning.host import Host
from restuning.sites import Needs, resolve_tokens
from restuning.tuners import ResAdapter

LORA_RANK = 8
"""PEFT's default, and the rank with which NOAH and V-PETL Bench train ViT-B/16 on VTAB-1K."""

SSF_STD = 0.02
"""Spread of the start of scales around 1 and of shifts around 0, as in the authors' code."""


class Inside(nn.Module):
    """A backbone with trained weights inside, and a head on its feature.

    Args:
        model: A copy of the backbone, changed; what is to be trained requires gradients.
        example: One input.
        head: On the feature.

    Shape:
        `b 3 h w -> b c`.
    """

    def __init__(self, model: nn.Module, example: tuple[Any, ...], head: nn.Linear) -> None:
        super().__init__()
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        # A host freezes what it is given, and its proofs run on the changed model.
        self.host = Host(model, *example)
        # Hence what trains was written down before, and is set free again after.
        for parameter in trained.values():
            parameter.requires_grad_(True)
        self.task = Within(trained, head)
        self.needs = Needs(("last",), resolve_tokens(self.host.readout_rule.pool))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images."""
        features, _ = self.host.run_tuned({}, self.needs, x)
        feature = self.host.readout(features["last"])
        return self.task.head(feature.to(self.task.head.weight.dtype))


class Within(nn.Module):
    """What is trained inside a backbone, as `fit` wants it: weights by name, and the head."""

    def __init__(self, weights: dict[str, nn.Parameter], head: nn.Linear) -> None:
        super().__init__()
        # ParameterDict takes no dots in names; see `Task`.
        self.weights = nn.ParameterDict({n.replace(".", "/"): p for n, p in weights.items()})
        self.head = head


def inject_lora(model: nn.Module, host: Host, options: dict[str, Any]) -> nn.Module:
    """LoRA as PEFT injects it: `W x + (alpha / r) B A x` on every fused `qkv`.

    Defaults are PEFT's (r 8, alpha 8, no dropout). On a fused map of ViT-B/16 that is
    12 x 8 x (768 + 2304) = 294,912 parameters: the 0.29 M that NOAH prints for LoRA on q and v
    (Zhang et al. 2022, Table 1), and Res-Tuning after it.

    Options: `rank`, `alpha` (default the rank), `targets` (names of maps with + between them).
    """
    peft = require("peft", "rivals", "the rival peft-lora")
    rank, targets = options.get("rank", LORA_RANK), options.get("targets", "qkv").split("+")
    config = peft.LoraConfig(
        r=rank, lora_alpha=options.get("alpha", rank), lora_dropout=0.0, target_modules=targets
    )
    return peft.inject_adapter_in_model(config, model)


class ScaledShifted(nn.Module):
    """`gamma * base(x) + beta`, a number a channel.

    Args:
        base: A linear map, a convolution or a norm; frozen.
        width: Channels it returns.
        last: Whether channels are its output's last axis (else the second).

    Start: gamma N(1, 0.02), beta N(0, 0.02).
    """

    def __init__(self, base: nn.Module, width: int, last: bool) -> None:
        super().__init__()
        self.base, self.last = base, last
        self.scale = nn.Parameter(1 + SSF_STD * torch.randn(width))
        self.shift = nn.Parameter(SSF_STD * torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        """The base's output, scaled and shifted."""
        y = self.base(x)
        shape = (-1,) if self.last else (-1, *[1] * (y.dim() - 2))
        return y * self.scale.view(shape) + self.shift.view(shape)


def insert_ssf(model: nn.Module, host: Host, options: dict[str, Any]) -> nn.Module:
    """SSF: a scale and a shift a channel after every linear map, convolution and norm.

    On ViT-B/16: 2 x (12 x 8,448 + 768 + 768) = 205,824 parameters; with heads the 0.28 M (CIFAR-100)
    and 0.24 M (VTAB-1K) that Lian et al. 2022 (arXiv 2210.08823) and Res-Tuning print. After
    training the base's own weights can take them up, so a forward costs what the backbone's costs.
    """
    # A list first: modules are replaced while we go through them.
    for path, module in list(model.named_modules()):
        if isinstance(module, (nn.Linear, nn.LayerNorm)):
            width = module.out_features if isinstance(module, nn.Linear) else module.weight.numel()
            replace_module(model, path, ScaledShifted(module, width, last=True))
        # Channels come second in maps.
        elif isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
            width = module.out_channels if isinstance(module, nn.Conv2d) else module.num_features
            replace_module(model, path, ScaledShifted(module, width, last=False))
    return model


class Parallel(nn.Module):
    """`op(x) + s * beside(x)`, on what the operation is given: after the norm.

    Args:
        op: The operation, frozen.
        beside: `b n d -> b n d`.
        scale: s, or None for a learned number a channel that starts at 1.
        dim: Width d.
    """

    def __init__(self, op: nn.Module, beside: nn.Module, scale: float | None, dim: int) -> None:
        super().__init__()
        self.op, self.beside = op, beside
        self.scale = nn.Parameter(torch.ones(dim)) if scale is None else scale

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the operation returns, with the addition to its first tensor."""
        y = self.op(x, *args, **kwargs)
        delta = self.scale * self.beside(x)
        # Some attention modules (nn.MultiheadAttention) return their weights beside the output.
        return (y[0] + delta, *y[1:]) if isinstance(y, tuple) else y + delta


def add_in_parallel(
    model: nn.Module,
    host: Host,
    make: Callable[[int], nn.Module],
    scale: float | None,
    layers: Any = None,
) -> nn.Module:
    """A module beside every MHA and FFN of a copy of a backbone, reading after the norm.

    Raises:
        NoSitesError: The backbone has neither, or its operations cannot be told apart.
    """
    sites = host.sites.pick("mha", "ffn", layers=slice(None) if layers is None else layers)
    for site in sites.values():
        if not site.module or site.layout != "b n d":
            raise NoSitesError(
                "an operation has no module of its own",
                where=site.name,
                fix="use a method of `restuning methods`",
            )
        replace_module(
            model,
            site.module,
            Parallel(model.get_submodule(site.module), make(site.dim), scale, site.dim),
        )
    return model


def tune_after_the_norm(model: nn.Module, host: Host, options: dict[str, Any]) -> nn.Module:
    """`res-tuning` but for where its tuners read: what MHA and FFN are given, after the norm.

    For the ablation. Res-Adapters with channel scales beside MHA and FFN: as many parameters as
    `res-tuning` (ViT-B/16: 405,744).
    """
    rank = options.get("rank", 10)
    return add_in_parallel(
        model, host, lambda dim: ResAdapter(dim, rank=rank, zero=True), None, options.get("layers")
    )


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in the place of the one at a path."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def copy_backbone(host: Host) -> nn.Module:
    """Copy a host's frozen backbone, without the host's hooks."""
    # With the host, whose hooks hold references into the model; released, the copy has none.
    twin = copy.deepcopy(host)
    twin.release()
    return twin.model
