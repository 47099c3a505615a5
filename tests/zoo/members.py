"""Who is in the zoo: timm's architectures under a size, and the families of the other libraries."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
import torchvision.models as tv
import transformers as hf
from torch import nn

from zoo.chain import Made
from zoo.sizes import SIZES, timm_names

PIXELS = (64, 128, 0)
"""Images tried in turn; 0 is the architecture's own size."""


def of_timm(name: str) -> Made:
    """An architecture of timm without a head, at the smallest of `PIXELS` that it takes."""
    error: Exception | None = None
    for pixels in PIXELS:
        try:
            return _timm_at(name, pixels)
        except (RuntimeError, AssertionError, ValueError, IndexError, TypeError, KeyError) as e:
            error = e
    raise RuntimeError(f"no image size fits: {error}")


def _timm_at(name: str, pixels: int) -> Made:
    own = timm.get_pretrained_cfg(name)
    channels, side = own.input_size[0], pixels or own.input_size[-1]
    sized = {"img_size": pixels} if pixels else {}
    try:
        model = timm.create_model(name, num_classes=0, **sized)
    except TypeError:
        model = timm.create_model(name, num_classes=0)
    image = torch.randn(1, channels, side, side)
    with torch.no_grad():
        out = model.eval()(image)
    if not isinstance(out, torch.Tensor) or out.dim() != 2:
        raise ValueError(f"returns no vector at {side} px")
    return model, (image,), {}


def count() -> None:
    """Write `sizes.json`; about 5 minutes, because timm builds every architecture."""
    sizes = {}
    for name in timm.list_models():
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=0)
        family = type(model).__module__.split(".")[-1]
        sizes[name] = [sum(p.numel() for p in model.parameters()), family]
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in sizes.items())
    SIZES.write_text(f"{{\n{lines}\n}}\n")


WIDE = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}
IMAGE = {"image_size": 32, "patch_size": 8}
WORDS = {"vocab_size": 60, "pad_token_id": 0, **WIDE}
GROUPED = {**WORDS, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}


def of_hf(cls: str, config: str, words: bool, values: dict[str, Any]) -> Made:
    """A model of transformers from a small configuration."""
    model: nn.Module = getattr(hf, cls)(getattr(hf, config)(**values))
    if not words:
        side = 64 if "depths" in values else 32
        return model, (torch.randn(1, 3, side, side),), {}
    ids = torch.arange(5, 14)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return model, (), {**inputs, **({"decoder_input_ids": ids} if cls == "T5Model" else {})}


def _hf(cls: str, config: str, words: bool = False, **values: Any) -> Callable[[], Made]:
    return partial(of_hf, cls, config, words, values)


TRANSFORMERS: dict[str, Callable[[], Made]] = {
    "ViT": _hf("ViTModel", "ViTConfig", **WIDE, **IMAGE),
    "DeiT": _hf("DeiTModel", "DeiTConfig", **WIDE, **IMAGE),
    "DINOv2": _hf(
        "Dinov2Model",
        "Dinov2Config",
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        **IMAGE,
    ),
    "BEiT": _hf("BeitModel", "BeitConfig", **WIDE, **IMAGE),
    "Swin": _hf(
        "SwinModel",
        "SwinConfig",
        image_size=64,
        patch_size=4,
        embed_dim=24,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
    ),
    "CLIP vision": _hf("CLIPVisionModel", "CLIPVisionConfig", **WIDE, **IMAGE),
    "CLIP text": _hf("CLIPTextModel", "CLIPTextConfig", True, **WORDS, eos_token_id=13),
    "SigLIP vision": _hf("SiglipVisionModel", "SiglipVisionConfig", **WIDE, **IMAGE),
    "SigLIP text": _hf("SiglipTextModel", "SiglipTextConfig", True, **WORDS),
    "ConvNeXt": _hf(
        "ConvNextModel", "ConvNextConfig", hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 2, 1]
    ),
    "ConvNeXtV2": _hf(
        "ConvNextV2Model", "ConvNextV2Config", hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 2, 1]
    ),
    "ResNet": _hf(
        "ResNetModel",
        "ResNetConfig",
        embedding_size=16,
        hidden_sizes=[32, 64, 64, 96],
        depths=[1, 2, 2, 1],
    ),
    "RegNet": _hf(
        "RegNetModel",
        "RegNetConfig",
        embedding_size=16,
        hidden_sizes=[32, 64, 64, 96],
        depths=[1, 2, 2, 1],
        groups_width=8,
    ),
    "MobileNetV2": _hf("MobileNetV2Model", "MobileNetV2Config", depth_multiplier=0.35),
    "BERT": _hf("BertModel", "BertConfig", True, **WORDS),
    "RoBERTa": _hf("RobertaModel", "RobertaConfig", True, **WORDS),
    "DistilBERT": _hf(
        "DistilBertModel",
        "DistilBertConfig",
        True,
        vocab_size=60,
        dim=48,
        n_layers=2,
        n_heads=4,
        hidden_dim=96,
    ),
    "GPT-2": _hf("GPT2Model", "GPT2Config", True, vocab_size=60, n_embd=48, n_layer=2, n_head=4),
    "Llama": _hf("LlamaModel", "LlamaConfig", True, **GROUPED),
    "Mistral": _hf("MistralModel", "MistralConfig", True, **GROUPED),
    "Qwen2": _hf("Qwen2Model", "Qwen2Config", True, **GROUPED),
    "Qwen3": _hf("Qwen3Model", "Qwen3Config", True, **GROUPED, head_dim=12),
    "Gemma": _hf("GemmaModel", "GemmaConfig", True, **GROUPED, head_dim=12),
    "Gemma2": _hf("Gemma2Model", "Gemma2Config", True, **GROUPED, head_dim=12),
    "T5 encoder": _hf(
        "T5EncoderModel",
        "T5Config",
        True,
        vocab_size=60,
        d_model=48,
        d_kv=12,
        d_ff=96,
        num_layers=2,
        num_heads=4,
    ),
    "T5": _hf(
        "T5Model",
        "T5Config",
        True,
        vocab_size=60,
        d_model=48,
        d_kv=12,
        d_ff=96,
        num_layers=2,
        num_heads=4,
    ),
}

TORCHVISION = (
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
    "swin_v2_t",
    "vgg11",
    "vgg11_bn",
    "vit_b_16",
    "wide_resnet50_2",
)
_FIXED = {"maxvit_t": 224, "vit_b_16": 224, "inception_v3": 96}


def of_torchvision(name: str) -> Made:
    """A classifier of torchvision as `load_backbone` gives it: without its last map."""
    from restuning import load_backbone

    model = load_backbone(f"torchvision:{name}", random=True).model
    side = _FIXED.get(name, 64)
    return model, (torch.randn(1, 3, side, side),), {}


def everyone() -> dict[str, tuple[str, Callable[[], Made]]]:
    """`{name: (family, maker)}`, names as `load_backbone` spells them."""
    members: dict[str, tuple[str, Callable[[], Made]]] = {
        f"timm:{name}": (family, partial(of_timm, name)) for name, family in timm_names().items()
    }
    members |= {f"transformers:{n}": ("transformers", make) for n, make in TRANSFORMERS.items()}
    members |= {
        f"torchvision:{n}": ("torchvision", partial(of_torchvision, n)) for n in TORCHVISION
    }
    assert set(TORCHVISION) <= set(tv.list_models(module=tv))
    return members
