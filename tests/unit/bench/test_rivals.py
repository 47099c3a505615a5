"""Rivals: their published sizes, equality with the library they come from, and what they leave alone."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F  # noqa: N812

from restuning import Host, RestuningError, methods
from restuning.backbones import Backbone, load_backbone
from restuning.bench import rivals
from restuning.bench.rivals.convpass import Convpass, quick_gelu
from restuning.task import Task

TOLERANCE = 1e-5
"""fp32, the same products in another order."""

CLASSES_CIFAR, HEAD_CIFAR = 100, 76_900
VTAB_MEAN_HEAD = 38_045
"""Of ViT-B/16 over the 19 tasks of VTAB-1K; paper.md section 3."""

PRINTED = {  # without a head, ViT-B/16; what is printed where stands in each docstring
    ("peft-lora", ()): 294_912,
    ("ssf", ()): 205_824,
    ("convpass", ()): 327_552,
    ("side-tuning", ()): 9_585_630 - VTAB_MEAN_HEAD,
    ("lst", ()): 2_376_300,
    ("lst", (("reduction", 16),)): 856_764,
    ("res-tuning-after-norm", ()): 482_644 - HEAD_CIFAR,
}
IN_MILLIONS = {  # printed with a head, cut or rounded to two digits
    "ssf": ((CLASSES_CIFAR, 0.28), (None, 0.24)),
    "peft-lora": ((0, 0.29),),
    "convpass": ((0, 0.33),),
    "side-tuning": ((CLASSES_CIFAR, 9.62), (None, 9.59)),
    "lst": ((CLASSES_CIFAR, 0.93), (None, 0.89)),
}


@pytest.fixture(scope="module")
def large():
    model = timm.create_model("vit_base_patch16_224", num_classes=0)
    example = torch.zeros(1, 3, 224, 224)
    return Host(model, example), Backbone("", model, (example,), {}, None)


@pytest.fixture
def small():
    backbone = load_backbone("restuning-tiny")
    return Host(backbone.model, *backbone.example), backbone


def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def sizes(task):
    trained = sum(p.numel() for p in task.parameters() if p.requires_grad)
    return trained, trained - sum(p.numel() for p in task.head.parameters())


@pytest.mark.parametrize(("name", "options"), PRINTED)
def test_parameter_counts_are_those_that_are_printed(large, name, options):
    host, backbone = large
    built = rivals.build(name, host, backbone, CLASSES_CIFAR, **dict(options))
    whole, bare = sizes(built.task)
    assert bare == PRINTED[name, options] and whole == bare + HEAD_CIFAR
    if options or name != "lst":
        for head, printed in IN_MILLIONS.get(name, ()):
            own = {None: VTAB_MEAN_HEAD, 0: 0, CLASSES_CIFAR: HEAD_CIFAR}[head]
            assert abs((bare + own) / 1e6 - printed) < 0.01


def test_houlsby_has_two_adapters_a_layer_of_the_published_form(large):
    host, _ = large
    d, m = 768, 64
    assert methods.build("houlsby", host, 2).tuner_parameters() == 24 * (2 * m * d + d + m)


def test_lora_is_what_peft_makes_of_the_same_model(small):
    peft = pytest.importorskip("peft")
    host, backbone = small
    ours = rivals.build("peft-lora", host, backbone, 5)
    generator = torch.Generator().manual_seed(3)
    for name, weight in ours.task.weights.items():
        weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
        assert "lora" in name
    model = load_backbone("restuning-tiny").model
    theirs = peft.get_peft_model(
        model, peft.LoraConfig(r=8, lora_alpha=8, target_modules=["qkv"])
    ).eval()
    own = {
        n.replace("base_model.model.", "").replace("/", "."): n
        for n, _ in theirs.named_parameters()
    }
    state = theirs.state_dict()
    for name, weight in ours.task.weights.items():
        state[own[name.replace("/", ".")]] = weight.data
    theirs.load_state_dict(state)
    with torch.no_grad():
        expected = ours.task.head(theirs(images()))
        torch.testing.assert_close(ours(images()), expected, atol=TOLERANCE, rtol=TOLERANCE)
        assert not torch.allclose(expected, ours.task.head(model(images())) * 0, atol=TOLERANCE)


def test_ssf_is_a_backbone_with_other_weights(small):
    host, backbone = small
    tuned = rivals.build("ssf", host, backbone, 5)
    folded = copy.deepcopy(load_backbone("restuning-tiny").model)
    for path, module in folded.named_modules():
        changed = dict(tuned.host.model.named_modules()).get(path)
        if type(changed).__name__ == "ScaledShifted":
            scale = changed.scale.data.view(-1, *[1] * (module.weight.dim() - 1))
            module.bias.data = changed.scale.data * module.bias.data + changed.shift.data
            module.weight.data = scale * module.weight.data
    with torch.no_grad():
        expected = tuned.task.head(folded(images()))
        torch.testing.assert_close(tuned(images()), expected, atol=1e-4, rtol=1e-4)
        bare = tuned.task.head(backbone.model(images()))
    assert not torch.allclose(expected, bare, atol=1e-2)


def test_convpass_convolves_patches_and_the_class_token_apart():
    torch.manual_seed(0)
    module = Convpass(12, width=4).eval()
    torch.nn.init.normal_(module.up.weight)
    torch.nn.init.normal_(module.convolution.weight)
    x = torch.randn(2, 1 + 9, 12)
    hidden = quick_gelu(module.down(x))

    def convolved(tokens, side):
        grid = tokens.mT.reshape(2, 4, side, side)
        y = F.conv2d(grid, module.convolution.weight, module.convolution.bias, padding=1)
        return y.flatten(2).mT

    both = torch.cat([convolved(hidden[:, :1], 1), convolved(hidden[:, 1:], 3)], 1)
    torch.testing.assert_close(module(x), module.up(quick_gelu(both)))


@pytest.mark.parametrize("name", ["peft-lora", "convpass", "res-tuning-after-norm"])
def test_rivals_that_start_as_no_change_start_so(small, name):
    host, backbone = small
    tuned = rivals.build(name, host, backbone, 5).eval()
    with torch.no_grad():
        expected = tuned.task.head(backbone.model(images()))
        torch.testing.assert_close(tuned(images()), expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", [n for n in rivals.RIVALS if n != "ms-swift"])
def test_a_step_trains_all_of_the_task_and_nothing_of_the_users_backbone(small, name):
    if name == "peft-lora":
        pytest.importorskip("peft")
    host, backbone = small
    before = copy.deepcopy(backbone.model.state_dict())
    tuned = rivals.build(name, host, backbone, 5)
    trained = [p for p in tuned.task.parameters() if p.requires_grad]
    assert {id(p) for p in tuned.parameters() if p.requires_grad} == {id(p) for p in trained}
    optimiser = torch.optim.SGD(trained, lr=1.0)
    for _ in range(2):  # what ends in zeros gives no gradient to what is before it, once
        optimiser.zero_grad()
        F.cross_entropy(tuned.train()(images()), torch.tensor([0, 1])).backward()
        optimiser.step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    idle = [n for n, p in tuned.task.named_parameters() if p.grad is not None and not p.grad.any()]
    assert not idle
    after = backbone.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_a_ladder_gets_the_same_from_stored_taps_as_live(small):
    host, backbone = small
    tuned = rivals.build("lst", host, backbone, 5).eval()
    assert isinstance(tuned.task, Task) and tuned.task.needs(host.readout_rule).tokens == "all"
    taps = host.features(images(), keep=tuned.task.needs(host.readout_rule))
    with torch.no_grad():
        live, fed = tuned(images()), tuned.task(dict(taps), host.readout)
    torch.testing.assert_close(live, fed)


def test_ms_swifts_bypass_is_three_times_the_papers(large):
    pytest.importorskip("swift")
    host, backbone = large
    assert sizes(rivals.build("ms-swift", host, backbone, 2).task)[1] == 1_198_848


def test_unknown_rivals_and_options_are_refused(small):
    host, backbone = small
    with pytest.raises(RestuningError, match="no such rival"):
        rivals.build("lroa", host, backbone, 2)
    with pytest.raises(RestuningError, match="no such option"):
        rivals.build("ssf", host, backbone, 2, rank=3)
