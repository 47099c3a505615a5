"""The chain over the zoo: a sample always, all of it with `-m longer` (shards by marker and `-k`)."""

import json

import pytest

from zoo import chain, members

EVERYONE = members.everyone()
SAMPLE = (
    "timm:test_resnet",
    "timm:test_efficientnet",
    "timm:test_convnext",
    "timm:test_nfnet",
    "timm:test_byobnet",
    "timm:regnetx_002",
    "timm:mobilenetv2_035",
    "timm:repghostnet_050",
    "timm:densenet121",
    "timm:test_maxvit",
    "timm:xcit_nano_12_p16_224",
    "timm:mobilevit_xxs",
    "timm:levit_128s",
    "transformers:CLIP vision",
    "transformers:SigLIP vision",
    "transformers:ConvNeXt",
    "transformers:ResNet",
    "transformers:Swin",
    "transformers:BERT",
    "transformers:GPT-2",
    "transformers:Llama",
    "torchvision:vgg11_bn",
    "torchvision:mobilenet_v3_small",
    "torchvision:squeezenet1_1",
)


def passes(name):
    family, make = EVERYONE[name]
    passed = chain.run(name, make, family=family)
    assert passed.ok, f"{passed.link}: {passed.reason}"
    return passed


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_of_the_zoo_passes_the_whole_chain(name):
    passed = passes(name)
    json.dumps(passed.row())


@pytest.mark.longer
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=getattr(pytest.mark, f"zoo_{n.partition(':')[0]}")) for n in EVERYONE],
)
def test_the_whole_zoo_passes_the_chain(name):
    passes(name)


def test_a_broken_link_is_found_and_named():
    """A backbone that remembers its last input must not pass."""
    import torch
    from torch import nn

    def make():
        model, args, kwargs = EVERYONE["timm:test_vit"][1]()
        model.register_buffer("seen", torch.zeros(()))

        class Counting(nn.Module):
            def forward(self, x):
                model.seen += 1
                return x

        model.blocks[0].add_module("counting", Counting())
        model.blocks[0].norm1 = nn.Sequential(model.blocks[0].norm1, model.blocks[0].counting)
        return model, args, kwargs

    passed = chain.run("counting", make)
    assert not passed.ok
    assert passed.link == "inline"
    assert "not what it was" in passed.reason
