"""Small backbones of several families, and PEFT's LoRA on copies of them with the weights of a task."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from awake import tiny_vit, wake
from restuning import Host, Task
from restuning.sites import LinearSite, LinearSites

TEXT = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
PICTURE = {**{n: v for n, v in TEXT.items() if n != "vocab_size"}, "intermediate_size": 64}
END = {"bos_token_id": 0, "eos_token_id": 0}


@dataclass(frozen=True)
class Family:
    """A backbone, an input of its forward by keyword ("*" is positional), and roles to tune."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    targets: tuple[str, ...]


def _hf(model: str, config: str, **sizes: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        return wake(getattr(transformers, model)(getattr(transformers, config)(**sizes)))

    return make


def _images() -> dict[str, Any]:
    return {"*": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))}


def _pixels() -> dict[str, Any]:
    return {"pixel_values": _images()["*"]}


def _words() -> dict[str, Any]:
    ids = torch.randint(2, 40, (2, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _resnet() -> nn.Module:
    from timm.models.resnet import BasicBlock, ResNet

    return wake(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=0, channels=(8, 16, 16, 32)))


def _resnext() -> nn.Module:
    from timm.models.resnet import Bottleneck, ResNet

    sizes = {"channels": (8, 16, 16, 32), "cardinality": 2, "num_classes": 0}
    return wake(ResNet(Bottleneck, [1, 1, 1, 1], **sizes))


FAMILIES = {
    "timm ViT": Family(tiny_vit, _images, ("qkv", "down")),
    "HF ViT": Family(
        _hf("ViTModel", "ViTConfig", image_size=32, patch_size=8, **PICTURE), _pixels, ("q", "v")
    ),
    "CLIP": Family(
        _hf("CLIPVisionModel", "CLIPVisionConfig", image_size=32, patch_size=8, **PICTURE),
        _pixels,
        ("q", "o", "up"),
    ),
    "BERT": Family(
        _hf("BertModel", "BertConfig", intermediate_size=64, **TEXT), _words, ("qkv", "down")
    ),
    "Llama": Family(
        _hf("LlamaModel", "LlamaConfig", intermediate_size=48, num_key_value_heads=2, **TEXT),
        _words,
        ("all",),
    ),
    "GPT-2": Family(
        _hf("GPT2Model", "GPT2Config", n_embd=32, n_layer=2, n_head=4, vocab_size=40, **END),
        _words,
        ("qkv", "o"),
    ),
    "ResNet": Family(_resnet, _images, ("conv",)),
}
GROUPED = Family(_resnext, _images, ("grouped",))
"""Convolutions of two groups, which take no product up."""


def run(module: Any, inputs: dict[str, Any]) -> Any:
    """What a module gives for the inputs of a family."""
    inputs = dict(inputs)
    args = (inputs.pop("*"),) if "*" in inputs else ()
    return module(*args, **inputs)


def first(output: Any) -> torch.Tensor:
    """The tensor that a backbone returns, alone or before others."""
    return output if isinstance(output, torch.Tensor) else output[0]


def host_of(family: Family, model: nn.Module, inputs: dict[str, Any] | None = None) -> Host:
    """A host on a family's backbone."""
    inputs = dict(inputs or family.inputs())
    args = (inputs.pop("*"),) if "*" in inputs else ()
    return Host(model, *args, **inputs)


def with_peft(model: nn.Module, sites: LinearSites, **config: Any) -> nn.Module:
    """A copy of a backbone in PEFT's own wrapper, with an adapter on the maps of some sites."""
    import peft

    maps = sorted({site.module for site in sites.values()})
    how: Any = {"target_modules": maps, **config}
    return peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**how)).eval()


def weights_of(wrapped: nn.Module, site: LinearSite, adapter: str = "default") -> tuple[Any, Any]:
    """`lora_A` and `lora_B` of PEFT's layer at a site."""
    layer: Any = wrapped.get_submodule(f"base_model.model.{site.module}")
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def give_weights(task: Task, host: Host, wrapped: nn.Module, adapter: str = "default") -> None:
    """Put a task's numbers into PEFT's layers."""
    with torch.no_grad():
        for name, tuner in task.inline_tuners.items():
            a, b = weights_of(wrapped, host.sites.linear[name], adapter)
            a.copy_(tuner.a.weight)
            b.copy_(tuner.b.weight)
