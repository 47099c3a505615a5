"""Methods: the paper's parameter counts, names, and errors in words."""

import pytest
import timm
import torch

from awake import tiny_vit
from restuning import Host, RestuningError, methods
from restuning._errors import RestuningWarning, UnknownNameError

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


@pytest.fixture(scope="module")
def small():
    return Host(tiny_vit(), torch.zeros(1, 3, 32, 32))


ALWAYS_SO = (
    *("linear", "full", "bitfit", "mixing-bypass", "ridge", "ensemble", "knn"),
    *("vpt-deep", "vpt-shallow"),
)
"""They have no tuners to start, or start them in one way only."""


@pytest.mark.parametrize("name", methods.names())
def test_a_start_is_chosen_or_refused_and_never_dropped_without_a_word(small, name):
    if name in ALWAYS_SO:
        for zero in (True, False):
            with pytest.raises(UnknownNameError, match="zero"):
                methods.build(name, small, num_classes=3, zero=zero)
        return
    changes = {}
    for zero in (True, False):
        torch.manual_seed(0)
        task = methods.build(name, small, num_classes=3, zero=zero)
        changes[zero] = [p.detach() for p in task.parameters()]
    assert any(not torch.equal(*pair) for pair in zip(*changes.values(), strict=True))


@pytest.mark.parametrize("name", ["linear", "res-tuning", "bypass-vertical", "mixing-bypass"])
@pytest.mark.parametrize(
    "option", [{"rank": 0}, {"rank": -2}, {"rank": 2.5}, {"rank": True}, {"drop_path": 1.0}]
)
def test_values_that_no_method_can_have_are_refused_by_all(small, name, option):
    with pytest.raises(UnknownNameError, match="cannot have this value"):
        methods.build(name, small, num_classes=3, **option)


@pytest.mark.parametrize("zero", ["False", "no", 2, 0.5])
def test_a_word_is_no_truth(small, zero):
    with pytest.raises(UnknownNameError, match="true .* or false"):
        methods.build("res-tuning", small, num_classes=3, zero=zero)


def test_none_is_the_default(small):
    drawn = []
    for options in ({}, {"zero": None, "rank": None, "scale": None}):
        torch.manual_seed(0)
        drawn.append(methods.build("res-tuning", small, num_classes=3, **options).state_dict())
    assert drawn[0].keys() == drawn[1].keys()
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])


@pytest.mark.filterwarnings("ignore:a method has no use")
@pytest.mark.parametrize("name", methods.names())
def test_an_option_changes_a_method_or_is_said_to_be_of_no_use(name):
    host = Host(tiny_vit(), torch.zeros(1, 3, 32, 32))
    others = {"rank": 3, "scale": "gate", "layers": [1], "drop_path": 0.5}

    def described(**options):
        torch.manual_seed(0)
        return str(methods.build(name, host, num_classes=3, **options).spec())

    for option, value in others.items():
        used = option in methods.keep_used(name, {option: value})
        assert (described() != described(**{option: value})) is used, option


def test_a_method_that_is_given_what_it_has_no_use_for_warns():
    host = Host(tiny_vit(), torch.zeros(1, 3, 32, 32))
    with pytest.warns(RestuningWarning, match=r"no use for an option[\s\S]*rank"):
        methods.build("linear", host, num_classes=3, rank=4)
