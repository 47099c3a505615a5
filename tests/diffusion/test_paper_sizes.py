"""The paper's sizes on the architecture of Stable Diffusion v1.5, counted without any weights."""

import pytest
import torch

from restuning import Host, methods
from restuning.forecast import AbsentWeights

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def host():
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    # The grid may be smaller than 64: no size depends on it.
    x, text = torch.randn(1, 4, 16, 16), torch.randn(1, 7, 768)
    with AbsentWeights(), torch.no_grad():
        return Host(unet, x, torch.tensor([1]), encoder_hidden_states=text)


def size(host, name, **options):
    with torch.device("meta"):
        return methods.build(name, host, **options).tuner_parameters()


def test_sixteen_transformer_blocks_have_self_and_cross_attention_and_a_feed_forward(host):
    for op in ("mha", "cross", "ffn"):
        sites = host.sites.pick(op)
        assert len(sites) == 16
        assert sum(s.dim for s in sites.values()) == 12_480
    assert [s.dim for s in host.sites.pick("stage").values()] == [1280, 1280, 1280, 640, 320]


def test_adapter_of_100_in_every_block_has_2_51_million(host):
    assert size(host, "adapter", rank=100) == 2_510_080


def test_prefix_of_100_on_both_attentions_has_4_99_million(host):
    name = "res-tuning[mha=prefix,cross=prefix]"
    assert size(host, name, rank=100, scale="none", query="stream") == 4_992_000


def test_prompt_of_100_in_every_block_has_1_25_million(host):
    assert size(host, "res-tuning[mha=prompt]", rank=100, query="stream") == 1_248_000


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [
        ("res-tuning[mha=adapter,ffn=adapter]", {"rank": 50}, 2_547_520),
        ("res-tuning[mha=adapter,ffn=adapter]", {"rank": 50, "scale": "none"}, 2_522_560),
        ("res-tuning[cross=adapter]", {"rank": 100, "scale": "channel"}, 2_522_560),
    ],
)
def test_res_tuning_at_the_paper_s_budget_is_2_5_million(host, name, options, parameters):
    """The paper prints 2.54 M and not which layout; these are the layouts next to it."""
    assert size(host, name, **options) == parameters
