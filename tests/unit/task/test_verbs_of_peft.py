"""What PEFT's users call: merge, disable_adapter, print_trainable_parameters; the same meanings here."""

import threading
import warnings

import pytest
import torch
from torch import nn

from awake import tiny_vit, wake
from peft_families import FAMILIES, GROUPED, first, give_weights, host_of, run, with_peft
from restuning import Blend, Host, Task, Tuned, merge, methods
from restuning._errors import WrongTaskError

X = FAMILIES["timm ViT"].inputs()["*"]
SAME = 1e-5
"""Products in another order, through a network whose weights are random."""


@pytest.fixture
def host():
    return Host(tiny_vit(), X[:1])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_merged_copy_computes_what_the_task_did_and_the_backbone_is_untouched(name):
    family = FAMILIES[name]
    host = host_of(family, family.make())
    task = wake(methods.build("lora", host, rank=4, alpha=6, targets=family.targets))
    before = {n: t.clone() for n, t in host.model.state_dict().items()}
    merged = merge(task, host)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in merged.modules())
    with torch.no_grad():
        with host.using(task):
            expected = first(run(host.model, family.inputs()))
        ours = first(run(merged, family.inputs()))
        size = expected.abs().max()
        assert (ours - expected).abs().max() < SAME * size
        assert (first(run(host, family.inputs())) - expected).abs().max() > 100 * SAME * size
    assert all(torch.equal(host.model.state_dict()[n], t) for n, t in before.items())


def test_parts_of_a_fused_map_and_blends_merge(host):
    tasks = [
        wake(methods.build("lora", host, rank=2, targets=t), i)
        for i, t in enumerate(("q+v", "all"))
    ]
    for task in (tasks[0], Blend((tasks[0], 0.5), (tasks[1], -1.5))):
        with torch.no_grad(), host.using(task):
            expected = host.model(X)
        torch.testing.assert_close(merge(task, host)(X), expected, atol=SAME, rtol=SAME)


def test_what_no_map_can_take_up_is_refused(host):
    for name, said in (("res-tuning", "scaled at mha.1"), ("res-tuning-bypass", "a side network")):
        with pytest.raises(WrongTaskError, match=said):
            merge(methods.build(name, host, 3), host)
    model = tiny_vit()
    model.blocks[1].attn.qkv.weight = model.blocks[0].attn.qkv.weight
    tied = Host(model, X[:1])
    with pytest.raises(WrongTaskError, match="another module's too"):
        merge(methods.build("lora", tied), tied)
    several = host_of(GROUPED, GROUPED.make())
    with pytest.raises(WrongTaskError, match="has 2 groups"):
        merge(methods.build("lora", several, targets="grouped"), several)


@pytest.mark.parametrize(
    "compute",
    [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm, nn.utils.spectral_norm],
)
def test_a_weight_that_is_computed_takes_nothing_up_and_is_refused(compute):
    model = tiny_vit()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compute(model.blocks[0].attn.qkv)
    computed = Host(model.eval(), X[:1])
    task = wake(methods.build("lora", computed, rank=2, targets="qkv"))
    with pytest.raises(WrongTaskError, match=r"blocks\.0\.attn\.qkv is computed"):
        merge(task, computed)


def test_disabled_a_task_answers_as_the_backbone_with_its_head_in_this_thread_alone(host):
    for name in ("lora", "res-tuning", "bitfit"):
        task = wake(methods.build(name, host, 3))
        tuned = Tuned(host, task).eval()
        elsewhere = []
        with torch.no_grad():
            on = tuned(X)
            with tuned.disable_adapter():
                off = tuned(X)
                ask = threading.Thread(target=lambda t=tuned, e=elsewhere: e.append(t(X)))
                ask.start()
                ask.join()
            assert torch.equal(tuned(X), on)
            assert torch.equal(elsewhere[0], on)
            plain = Tuned(host, Task(head=task.head))(X)
        torch.testing.assert_close(off, plain, atol=SAME, rtol=SAME)
        assert not torch.allclose(on, off, atol=1e-3)
    headless = Tuned(host, wake(methods.build("res-tuning-bypass", host)))
    with torch.no_grad(), headless.disable_adapter():
        assert torch.equal(headless(X), host(X))
    with (
        pytest.raises(WrongTaskError, match="cannot be switched off"),
        Tuned(host, methods.build("res-tuning-bypass", host, 3)).disable_adapter(),
    ):
        pass


def test_what_is_switched_off_inside_stays_off_until_the_outer_one_ends(host):
    tuned = Tuned(host, wake(methods.build("lora", host))).eval()
    with torch.no_grad():
        on, bare = tuned(X), host(X)
        with tuned.disable_adapter():
            with tuned.disable_adapter():
                assert torch.equal(tuned(X), bare)
            assert torch.equal(tuned(X), bare)
        assert torch.equal(tuned(X), on)
    assert not torch.allclose(on, bare, atol=1e-3)


def test_a_blend_is_what_peft_calls_cat_and_not_what_it_calls_linear(host):
    pytest.importorskip("peft")
    tasks = [wake(methods.build("lora", host, rank=4, targets="qkv"), i) for i in (1, 2)]
    wrapped = with_peft(tiny_vit(), host.sites.linear.pick("qkv"), r=4, lora_alpha=4)
    wrapped.add_adapter("other", wrapped.peft_config["default"])
    give_weights(tasks[0], host, wrapped)
    give_weights(tasks[1], host, wrapped, "other")
    answers = {}
    for kind in ("cat", "linear"):
        wrapped.add_weighted_adapter(["default", "other"], [0.7, 0.4], kind, combination_type=kind)
        wrapped.set_adapter(kind)
        with torch.no_grad():
            answers[kind] = wrapped(X)
    with torch.no_grad(), host.using(Blend((tasks[0], 0.7), (tasks[1], 0.4))):
        ours = host.model(X)
    torch.testing.assert_close(ours, answers["cat"], atol=SAME, rtol=SAME)
    assert not torch.allclose(ours, answers["linear"], atol=1e-3)


def test_parameters_are_counted_as_peft_counts_them(host, capsys):
    pytest.importorskip("peft")
    Tuned(host, methods.build("lora", host, rank=4)).print_trainable_parameters()
    ours = capsys.readouterr().out
    with_peft(tiny_vit(), host.sites.linear.pick("qkv"), r=4).print_trainable_parameters()
    assert ours == capsys.readouterr().out
