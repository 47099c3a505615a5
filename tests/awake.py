"""Small models whose parameters are all awake."""

import pytest
import torch
from torch import nn


def wake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter afresh: zero heads and LayerScale 1e-6 would make laws vacuous."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.is_floating_point():
                p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.dim() < 2 else 0.1))
                if "norm" in name.lower() and name.endswith("weight"):
                    p.add_(1)
    return model.eval()


def tiny_swin() -> nn.Module:
    """Of two stages with a block each, which attend inside of windows."""
    from timm.models.swin_transformer import SwinTransformer

    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "window_size": 4}
    return wake(SwinTransformer(**sizes, depths=(1, 1), num_heads=(2, 2), num_classes=0))


def tiny_bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=32,
    )
    return wake(transformers.BertModel(config))


def tiny_vit(seed: int = 0, **kwargs) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4}
    return wake(VisionTransformer(**{**sizes, "num_classes": 0, **kwargs}), seed)


def solve_parts(task: nn.Module, host) -> None:
    """What is solved answers only once it is: each such part of a task, from nine inputs of three classes."""
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(9, 3, 32, 32, generator=draw)
    for part in task.modules():
        if getattr(part, "solved", False) and hasattr(part, "solve"):
            taps = host.features(x, keep=part.needs(task.pool or host.readout_rule.pool))
            part.solve([(taps, torch.arange(9) % 3)])
