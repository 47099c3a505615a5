"""A backbone that draws in eval mode is refused when a host is built on it; one that rounds is not."""

import pytest
import timm
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from restuning import Host, load_backbone
from restuning._errors import BackboneError
from restuning.host.randomness import refuse_randomness

hf = pytest.importorskip("transformers")
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}


class Drops(nn.Module):
    """Dropout as a function, which eval mode does not reach."""

    def forward(self, x):
        return F.dropout(x, 0.1, training=True)


class Noisy(nn.Module):
    """Noise of a hundredth on what it reads, as routers of experts have it."""

    def forward(self, x):
        return x * torch.empty_like(x).uniform_(0.99, 1.01)


class DropsTokens(nn.Module):
    """A part of the tokens, in a new order each time."""

    def forward(self, x):
        return x[:, torch.randperm(x.shape[1])[: x.shape[1] // 2]]


@pytest.mark.parametrize("part", [Drops, Noisy, DropsTokens])
def test_what_draws_in_eval_mode_is_refused(part):
    model = timm.create_model("test_vit", num_classes=0).eval()
    model.norm_pre = part()
    with pytest.raises(BackboneError, match="at random"):
        Host(model, torch.zeros(1, 3, 64, 64))


def test_a_masked_autoencoder_is_refused_and_its_mask_is_named():
    config = hf.ViTMAEConfig(**TINY, image_size=32, patch_size=8)
    with pytest.raises(BackboneError, match="plain ViT"):
        Host(hf.ViTMAEModel(config).eval(), torch.zeros(1, 3, 32, 32))


def test_by_name_a_masked_autoencoder_sees_all_patches_in_their_order(tmp_path):
    model = hf.ViTMAEModel(hf.ViTMAEConfig(**TINY, image_size=32, patch_size=8)).eval()
    model.save_pretrained(tmp_path)
    size = {"height": 32, "width": 32}
    hf.ViTImageProcessor(size=size).save_pretrained(tmp_path)
    backbone = load_backbone(f"hf:{tmp_path}")
    assert len(backbone.host().sites)
    x = torch.randn(1, 3, 32, 32)
    model.config.mask_ratio = 0.0
    with torch.no_grad():
        wanted = model(x, noise=torch.arange(16.0)[None]).last_hidden_state
        found = backbone.model(x).last_hidden_state
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_kernels_that_add_in_any_order_are_no_randomness(kind):
    answer = torch.randn(4, 100)
    # A few units in the last place.
    near = answer * (1 + 4 * torch.finfo(kind).eps * torch.randn(4, 100).clamp(-1, 1))
    refuse_randomness(nn.Identity(), answer.to(kind), near.to(kind))


def test_answers_that_are_not_finite_or_no_numbers_are_compared_in_peace():
    nothing = torch.full((2, 3), float("nan"))
    refuse_randomness(nn.Identity(), (nothing, None, "a"), (nothing, None, "a"))
    refuse_randomness(nn.Identity(), {"ids": torch.tensor([1])}, {"ids": torch.tensor([2])})
    with pytest.raises(BackboneError):
        refuse_randomness(nn.Identity(), torch.zeros(2), torch.ones(2))
