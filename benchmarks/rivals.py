"""The rivals, built as their own documentation says: PEFT's LoRA and ms-swift's ResTuning."""

from __future__ import annotations

from typing import Any

RANK = 8
"""Of LoRA: the usual one in vision (PEFT's examples and the papers of the field)."""


def trained(model: Any) -> list[Any]:
    """Parameters that a method trains."""
    return [p for p in model.parameters() if p.requires_grad]


def lora(model: Any, *, checkpointing: bool = False) -> Any:
    """PEFT's LoRA of rank 8 on every `qkv`, and the head, of a timm ViT."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["qkv"], modules_to_save=["head"])
    model = get_peft_model(model, config)
    if checkpointing:
        model.base_model.model.set_grad_checkpointing(True)
    return model.train()


def swift(model: Any) -> Any:
    """ms-swift's bypass with Res-Adapters on all blocks of a timm ViT, and the head."""
    from swift.tuners import ResTuningConfig, Swift

    model.requires_grad_(False)
    config = ResTuningConfig(
        dims=model.embed_dim,
        root_modules=r".*blocks.0$",
        stem_modules=r".*blocks\.\d+$",
        target_modules=r"norm",
        tuner_cfg="res_adapter",
    )
    model = Swift.prepare_model(model, config)
    model.head.requires_grad_(True)
    return model.train()


def full(model: Any, *, checkpointing: bool = False) -> Any:
    """All weights."""
    if checkpointing:
        model.set_grad_checkpointing(True)
    return model.train()


def linear(model: Any) -> Any:
    """The head alone, on a live backbone."""
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    return model.train()
