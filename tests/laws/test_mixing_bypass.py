"""The mixing bypass: starts as linear probing, sends nothing into the backbone, is a task like others."""

import copy

import pytest
import torch

from awake import tiny_vit, wake
from restuning import Bank, Host, Tuned, load, methods, save
from restuning._errors import NoSitesError, TunerShapeError
from restuning.bypass import MixingBypass, Pooling
from restuning.forecast.ledger import SavedTensors
from restuning.tuners import ConvAdapter, LowRankAttention, real_tokens
from zoo.table import NOT_YET, ZOO

SMALL = {"width": 8, "heads": 2, "rank": 8}
SAME_TOLERANCE = 1e-5
"""Products of other batch sizes round elsewhere."""
KEPT_AT_MOST = 0.7
"""Of what is kept without computing again: states and the pooling stay, a large part where all is tiny."""


def task_of(host, **options):
    torch.manual_seed(1)
    return methods.build("mixing-bypass", host, num_classes=3, **{**SMALL, **options})


def awake(host):
    task = task_of(host)
    wake(task)
    return task.eval()


@pytest.fixture(params=sorted(set(ZOO) - set(NOT_YET)))
def member(request):
    model, args, kwargs = ZOO[request.param][0]()
    return Host(wake(model), *args, **kwargs), args, kwargs


def test_it_starts_as_linear_probing_and_trains_without_the_backbone(member):
    host, args, kwargs = member
    task = task_of(host)
    if host.readout_rule.pool == "own":
        with pytest.raises(TunerShapeError, match="reads streams of tokens"):
            Tuned(host, task)(*args, **kwargs)
        return
    tuned = Tuned(host, task)
    before = {name: p.clone() for name, p in host.model.state_dict().items()}
    features = host.features(*args, keep=["last"], **kwargs)
    feature = host.readout(features["last"], mask=features.mask)
    assert not task.head.weight[:, host.dim :].any()
    probe = torch.nn.functional.linear(
        feature, task.head.weight[:, : host.dim].detach(), task.head.bias.detach()
    )
    logits = tuned(*args, **kwargs)
    torch.testing.assert_close(logits, probe, atol=SAME_TOLERANCE, rtol=SAME_TOLERANCE)
    with torch.no_grad():
        task.head.weight.normal_()
    tuned(*args, **kwargs).square().sum().backward()
    assert all(p.grad is not None for p in task.parameters())
    assert all(p.grad is None for p in host.model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in host.model.state_dict().items())


def test_it_is_saved_and_loaded(tmp_path):
    host = Host(tiny_vit(), torch.zeros(1, 3, 32, 32))
    task = awake(host)
    save(task, host, tmp_path / "a.task", backbone="tiny")
    again = load(tmp_path / "a.task", host).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(Tuned(host, again)(x), Tuned(host, task)(x))


def test_a_bank_answers_with_it_and_a_bypass_of_the_paper_from_one_forward():
    host = Host(tiny_vit(), torch.zeros(1, 3, 32, 32))
    mixing, plain = awake(host), methods.build("res-tuning-bypass", host, num_classes=5).eval()
    bank = Bank({"mixing": mixing, "plain": plain})
    x = torch.randn(2, 3, 32, 32)
    answers = bank(host.features(x, keep=bank.keep))
    for name, task in (("mixing", mixing), ("plain", plain)):
        torch.testing.assert_close(
            answers[name], Tuned(host, task)(x), atol=SAME_TOLERANCE, rtol=SAME_TOLERANCE
        )


def test_it_sees_where_things_are():
    host = Host(tiny_vit(), torch.zeros(1, 3, 32, 32))
    task = awake(host)
    with torch.no_grad():
        for p in task.side.parameters():
            p.mul_(5)
    taps = host.features(torch.randn(2, 3, 32, 32), keep=task.needs(host.readout_rule))
    moved = copy.copy(taps)
    # The grid mirrored: the class token and every token's value stay, places change.
    for name, tap in taps.items():
        grid = tap[:, 1:].unflatten(1, (4, 4)).flip(2).flatten(1, 2)
        moved[name] = torch.cat([tap[:, :1], grid], 1)
    assert not torch.allclose(task(moved), task(taps), atol=1e-3)


@pytest.mark.parametrize("name", ["hf bert", "hf llama", "hf vit", "hf clip vision", "timm vit"])
def test_images_get_a_convolution_and_texts_do_not(name):
    model, args, kwargs = ZOO[name][0]()
    host = Host(wake(model), *args, **kwargs)
    assert host.images == (name not in ("hf bert", "hf llama"))
    found = any(isinstance(t, ConvAdapter) for t in task_of(host).side.tuners)
    assert found == host.images


def test_drop_path_is_off_at_inference_and_on_in_training():
    host = Host(tiny_vit(), torch.zeros(1, 3, 32, 32))
    task = awake(host)
    task.side.drop_path = 0.5
    tuned, x = Tuned(host, task), torch.randn(4, 3, 32, 32)
    assert torch.equal(tuned.eval()(x), tuned(x))
    tuned.train()
    assert not torch.equal(tuned(x), tuned(x))


@pytest.mark.parametrize("member", ["timm vit", "hf bert"], indirect=True)
def test_computing_again_gives_the_same_gradients_from_a_fraction_of_what_was_kept(member):
    host, args, kwargs = member
    task = awake(host).train()
    task.side.drop_path = 0.5
    needs = task.needs(host.readout_rule)
    taps = host.features(*args, keep=needs, **kwargs)
    found, kept = [], []
    for again in (False, True):
        task.side.recompute = again
        torch.manual_seed(3)
        with (saved := SavedTensors(list(task.parameters()))).hooks():
            logits = task(taps)
        kept.append(saved.bytes())
        logits.square().sum().backward()
        found.append([p.grad.clone() for p in task.parameters()])
        task.zero_grad()
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert kept[1] < KEPT_AT_MOST * kept[0]


def test_without_classes_it_is_refused_in_words():
    host = Host(tiny_vit(), torch.zeros(1, 3, 32, 32))
    with pytest.raises(NoSitesError, match="makes a feature for a head"):
        methods.build("mixing-bypass", host)


def test_taps_widths_and_tuners_must_agree():
    with pytest.raises(TunerShapeError, match="2 taps, 1 widths"):
        MixingBypass(["block.1", "block.2"], [4], [[LowRankAttention(4, rank=4)]], Pooling(4))


def test_attention_sees_no_padding():
    tuner = LowRankAttention(8, rank=4, heads=2)
    x, mask = torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)
    mask[0, 3:] = False
    with real_tokens(mask):
        padded = tuner(x)
    torch.testing.assert_close(padded[0, :3], tuner(x[:1, :3])[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(padded[1], tuner(x)[1], atol=1e-6, rtol=1e-5)
