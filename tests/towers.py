"""Small vision-language models with random weights, as folders that `load_backbone` reads."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers as hf
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

from awake import wake

WORDS = [
    "a",
    "the",
    "of",
    "photo",
    "picture",
    "cat",
    "dog",
    "red",
    "panda",
    "truck",
    "street",
    "house",
    "tree",
    "big",
    "small",
    ".",
    "in",
    "on",
]
VOCABULARY = {w: i for i, w in enumerate(["[PAD]", "[START]", "[UNK]", *WORDS, "[END]"])}
LENGTH = 12
PIXELS = 32
VISION = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": PIXELS,
    "patch_size": 8,
}
TEXT = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 40,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": VOCABULARY["[END]"],
}


def tokenizer() -> hf.PreTrainedTokenizerFast:
    """Words at white space, with a start and an end, as CLIP's has."""
    made = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[START] $A [END]", special_tokens=[("[START]", 1), ("[END]", VOCABULARY["[END]"])]
    )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token="[START]",
        eos_token="[END]",
    )


def clip() -> nn.Module:
    """CLIP of transformers."""
    config = hf.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=24)
    return _woken(hf.CLIPModel(config))


def siglip() -> nn.Module:
    """SigLIP of transformers; its text map is as wide as its images."""
    text = {**TEXT, "hidden_size": 48, "projection_size": 48}
    config = hf.SiglipConfig(text_config=text, vision_config=VISION)
    return _woken(hf.SiglipModel(config))


def _woken(model: nn.Module) -> nn.Module:
    scale = float(model.logit_scale.detach())
    wake(model)
    with torch.no_grad():
        # A drawn scale near one would make all classes alike.
        model.logit_scale.fill_(scale)
    return model


def saved(model: nn.Module, folder: Path) -> str:
    """A folder of transformers; returns the backbone's name."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return f"clip:{folder}"


OPEN_TEXT = {"context_length": LENGTH, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2}
OPEN_VISION = {
    "ViT": {"image_size": PIXELS, "layers": 3, "width": 48, "patch_size": 8, "head_width": 12},
    "ViT with mean": {
        "image_size": PIXELS,
        "layers": 3,
        "width": 48,
        "patch_size": 8,
        "head_width": 12,
        "pool_type": "avg",
        "final_ln_after_pool": True,
        "ls_init_value": 0.1,
    },
    "ResNet": {"image_size": PIXELS, "layers": [1, 1, 1, 1], "width": 16},
    "timm": {
        "image_size": PIXELS,
        "timm_model_name": "test_vit",
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "linear",
    },
}


def openclip(kind: str, folder: Path) -> str:
    """A folder of open_clip; returns the backbone's name."""
    import open_clip

    config = {"embed_dim": 24, "vision_cfg": OPEN_VISION[kind], "text_cfg": OPEN_TEXT}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {"mean": [0.4] * 3, "std": [0.3] * 3}})
    )
    model = _woken(open_clip.create_model(f"local-dir:{folder}", load_weights=False))
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    return f"openclip:local-dir:{folder}"
