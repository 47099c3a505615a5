"""The zoo: small backbones with random weights, and what the finder must say of them."""

import timm
import torch
import torchvision.models as tv
import transformers as hf

IMAGE = {"image_size": 32, "patch_size": 8}
SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}
WORDS = {"vocab_size": 60, **SIZES}


def of_timm(name, size=32, **kwargs):
    def make():
        model = timm.create_model(name, num_classes=0, **kwargs)
        return model, (torch.randn(1, 3, size, size),), {}

    return make


def of_hf(cls, config, image=True, **kwargs):
    def make():
        model = getattr(hf, cls)(getattr(hf, config)(**kwargs))
        if image:
            return model, (torch.randn(1, 3, 32, 32),), {}
        ids = torch.arange(5, 14)[None]
        return model, (), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return make


def of_sounds(cls, config, shape, **kwargs):
    def make():
        model = getattr(hf, cls)(getattr(hf, config)(**kwargs))
        given = {"input_values": torch.randn(1, *shape)}
        # Samples have a mask, frames of one length have none.
        mask = {"attention_mask": torch.ones(1, *shape, dtype=torch.long)}
        return model, (), given | (mask if len(shape) == 1 else {})

    return make


def tv_vit():
    model = tv.VisionTransformer(32, 8, 2, 4, 48, 96, num_classes=5)
    model.heads = torch.nn.Identity()
    return model, (torch.randn(1, 3, 32, 32),), {}


def tv_swin():
    model = tv.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=5)
    model.head = torch.nn.Identity()
    return model, (torch.randn(1, 3, 64, 64),), {}


AST = {**SIZES, "patch_size": 8, "frequency_stride": 8, "time_stride": 8}
WAVES = {
    **SIZES,
    "conv_dim": [8, 16],
    "conv_stride": [8, 8],
    "conv_kernel": [16, 8],
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
# name: (maker, layers, whether the projections are proved)
ZOO = {
    "timm vit": (of_timm("vit_tiny_patch16_224", **VIT), 2, True),
    "timm vit, registers": (of_timm("vit_small_patch14_reg4_dinov2", **VIT), 2, True),
    "timm vit, mean pool": (
        of_timm("vit_tiny_patch16_224", **VIT, global_pool="avg", class_token=False),
        2,
        True,
    ),
    "timm deit": (of_timm("deit_tiny_patch16_224", **VIT), 2, True),
    "timm deit3": (of_timm("deit3_small_patch16_224", **VIT), 2, True),
    "timm dinov2": (of_timm("vit_small_patch14_dinov2", **VIT), 2, True),
    "timm beit": (of_timm("beit_base_patch16_224", **VIT), 2, False),
    "timm eva02": (of_timm("eva02_tiny_patch14_224", **VIT), 2, False),
    "timm cait": (of_timm("cait_xxs24_224", **VIT), 2, False),
    "timm xcit": (
        of_timm("xcit_nano_12_p16_224", size=64, img_size=64, embed_dim=48, depth=2, num_heads=4),
        2,
        False,
    ),
    "timm swin": (
        of_timm(
            "swin_tiny_patch4_window7_224",
            size=64,
            img_size=64,
            window_size=4,
            embed_dim=24,
            depths=(2, 1),
            num_heads=(2, 4),
        ),
        3,
        False,
    ),
    "timm swinv2": (
        of_timm(
            "swinv2_tiny_window8_256",
            size=64,
            img_size=64,
            window_size=4,
            embed_dim=24,
            depths=(2, 1),
            num_heads=(2, 4),
        ),
        3,
        False,
    ),
    "hf vit": (of_hf("ViTModel", "ViTConfig", **SIZES, **IMAGE), 2, True),
    "hf deit": (of_hf("DeiTModel", "DeiTConfig", **SIZES, **IMAGE), 2, True),
    "hf dinov2": (
        of_hf(
            "Dinov2Model",
            "Dinov2Config",
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            **IMAGE,
        ),
        2,
        True,
    ),
    "hf clip vision": (of_hf("CLIPVisionModel", "CLIPVisionConfig", **SIZES, **IMAGE), 2, True),
    "hf siglip vision": (
        of_hf("SiglipVisionModel", "SiglipVisionConfig", **SIZES, **IMAGE),
        2,
        True,
    ),
    "hf ast": (
        of_sounds("ASTModel", "ASTConfig", **AST, max_length=48, num_mel_bins=16, shape=(48, 16)),
        2,
        True,
    ),
    "hf wav2vec2": (of_sounds("Wav2Vec2Model", "Wav2Vec2Config", **WAVES, shape=(800,)), 2, True),
    "hf bert": (of_hf("BertModel", "BertConfig", image=False, **WORDS), 2, True),
    "hf roberta": (of_hf("RobertaModel", "RobertaConfig", image=False, **WORDS), 2, True),
    "hf llama": (of_hf("LlamaModel", "LlamaConfig", image=False, **WORDS), 2, True),
    "hf gpt2": (
        of_hf(
            "GPT2Model", "GPT2Config", image=False, vocab_size=60, n_embd=48, n_layer=2, n_head=4
        ),
        2,
        True,
    ),
    "torchvision vit": (tv_vit, 2, True),
    "torchvision swin": (tv_swin, 4, False),
}
NOT_YET: set[str] = set()
