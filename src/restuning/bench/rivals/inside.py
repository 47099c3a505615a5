"""Rivals whose weights live inside the backbone: modules of a copy of it are replaced."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from restuning._errors import require
from restuning.bypass import Needs, tokens_of
from restuning.host import Host

LORA_RANK = 8
"""PEFT's default, and the rank with which NOAH and V-PETL Bench train ViT-B/16 on VTAB-1K."""


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
        for parameter in trained.values():
            parameter.requires_grad_(True)
        self.task = Within(trained, head)
        rule = self.host.readout_rule
        self.needs = Needs(("last",), tokens_of(rule.pool))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images."""
        kept, _ = self.host.tuned({}, self.needs, x)
        feature = self.host.readout(kept["last"])
        return self.task.head(feature.to(self.task.head.weight.dtype))


class Within(nn.Module):
    """What is trained of an `Inside`, as `fit` wants it: weights by name, and the head."""

    def __init__(self, weights: dict[str, nn.Parameter], head: nn.Linear) -> None:
        super().__init__()
        self.weights = nn.ParameterDict({n.replace(".", "/"): p for n, p in weights.items()})
        self.head = head


def lora(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    """LoRA as PEFT injects it: `W x + (alpha / r) B A x` on every fused `qkv`.

    Defaults are PEFT's (r 8, alpha 8, no dropout). On a fused map of ViT-B/16 that is
    12 x 8 x (768 + 2304) = 294,912 parameters: the 0.29 M that NOAH prints for LoRA on q and v
    (Zhang et al. 2022, Table 1), and Res-Tuning after it.

    Options: `rank`, `alpha` (default the rank), `targets` (names of maps with + between them).
    """
    peft = require("peft", "rivals", "the rival lora")
    rank, targets = options.get("rank", LORA_RANK), options.get("targets", "qkv").split("+")
    config = peft.LoraConfig(
        r=rank, lora_alpha=options.get("alpha", rank), lora_dropout=0.0,
        target_modules=targets,
    )  # fmt: skip
    return peft.inject_adapter_in_model(config, model)


def copied(host: Host) -> nn.Module:
    """A frozen copy of a host's backbone, without its hooks."""
    twin = copy.deepcopy(host)
    twin.release()
    return twin.model


def fresh_head(dim: int, classes: int) -> nn.Linear:
    """A head as `methods.build` makes it."""
    head = nn.Linear(dim, classes)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head
