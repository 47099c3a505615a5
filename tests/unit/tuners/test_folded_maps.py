"""Attention to learned tokens, folded into two small maps, is the attention it stands for."""

import pytest
import torch

from awake import tiny_vit
from restuning import Host, ResPrefix, ResPrompt
from restuning.sites import LentProjections

FOLDED_TOLERANCE = 1e-5
"""The maps are multiplied in another order; fp32 rounds in another place."""


def clip():
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
    )
    return transformers.CLIPVisionModel(config)


def torchvision_vit():
    from torchvision.models import VisionTransformer

    return VisionTransformer(16, 4, 2, 4, 32, 48, num_classes=10)


@pytest.mark.parametrize("make", [tiny_vit, clip, torchvision_vit])
@pytest.mark.parametrize("kind", [ResPrefix, ResPrompt])
def test_folded_attention_equals_the_attention_it_stands_for(make, kind, monkeypatch):
    model = make().eval()
    size = 32 if make is tiny_vit else 16
    host = Host(model, torch.randn(1, 3, size, size))
    site = host.sites["mha.1"]
    view = host._projections[site.name]
    tuner = kind(site.dim, length=3, heads=site.projections.heads)
    x = torch.randn(2, 5, site.dim)
    assert view.fold(*tuner.keys_values(view)) is not None
    folded = tuner(x, view)
    monkeypatch.setattr(LentProjections, "fold", lambda *_: None)
    plain = tuner(x, view)
    assert plain.abs().max() > 0
    torch.testing.assert_close(folded, plain, atol=FOLDED_TOLERANCE, rtol=FOLDED_TOLERANCE)
