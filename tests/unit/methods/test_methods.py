"""Methods: the paper's parameter counts, names, and errors in words."""

import pytest
import timm
import torch

from restuning import Host, RestuningError, methods

PRINTED = {  # ViT-B/16, 100 classes; paper.md 1.5, derived from the paper's tables
    "linear": 76_900,
    "res-tuning": 482_644,
    "res-tuning-tri": 676_300,
    "res-tuning-bypass": 464_212 + 12,
    "res-tuning-single": 169_060,
    "res-tuning[mha=adapter]": 270_556,
    "res-tuning[mha=prefix]": 261_220,
    "prefix": 261_220,
    "vpt-deep": 169_060,
    "vpt-shallow": 84_580,
    "adapter": 270_556,
    "adaptformer": 1_266_532,
}


@pytest.fixture(scope="module")
def host():
    return Host(
        timm.create_model("vit_base_patch16_224", num_classes=0), torch.zeros(1, 3, 224, 224)
    )


@pytest.mark.parametrize("name", PRINTED)
def test_parameter_counts_are_those_of_the_paper(host, name):
    assert methods.build(name, host, num_classes=100).trainable_parameters() == PRINTED[name]


def test_a_typing_error_is_answered_with_the_nearest_name(host):
    with pytest.raises(RestuningError, match="res-tuning-bypass"):
        methods.build("res-tuning-bypas", host, num_classes=3)


@pytest.mark.parametrize(
    "name",
    [
        "res-tuning[]",
        "res-tuning[mha]",
        "res-tuning[mha=lora]",
        "res-tuning[mha=adapter,mha=prefix]",
        "res-tuning[x=adapter]",
    ],
)
def test_a_malformed_combination_is_refused(host, name):
    with pytest.raises(RestuningError, match="not a combination"):
        methods.build(name, host, num_classes=3)


def test_an_unknown_option_is_refused(host):
    with pytest.raises(RestuningError, match="no such option"):
        methods.build("res-tuning", host, num_classes=3, rnk=4)


def test_an_unknown_readout_is_refused(host):
    with pytest.raises(RestuningError, match="no such readout"):
        methods.build("linear", host, num_classes=2, pool="max")
