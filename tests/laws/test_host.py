"""Laws of the host: nothing leaks, nothing mixes, what goes wrong says so."""

import copy
import pickle
import re
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import restuning
from awake import tiny_vit
from restuning import Host, SiteNotReachedError, Tuned, methods
from restuning._errors import RecomputedError, WrongTaskError
from restuning.bypass import STARTING_LAMBDA

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def host():
    return Host(tiny_vit(), X[:1])


def drawn(host, name="res-tuning", seed=0):
    task = methods.build(name, host, num_classes=4)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in task.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return Tuned(host, task).eval()


def test_only_the_host_registers_hooks():
    source = Path(restuning.__file__).parent
    places = {
        p.relative_to(source).parts[0]
        for p in source.rglob("*.py")
        if re.search(r"register_(full_)?(module_)?forward", p.read_text())
    }
    assert places == {"host"}


def test_release_leaves_no_hook(host):
    host.release()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.model.modules())


def test_two_threads_never_mix_their_tasks(host):
    tasks = [drawn(host, seed=s) for s in (1, 2)]
    with torch.no_grad():
        expected = [t(X) for t in tasks]
    wrong = []

    def work(index):
        torch.set_num_threads(1)
        with torch.no_grad():
            wrong.extend(1 for _ in range(30) if not torch.equal(tasks[index](X), expected[index]))

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


def test_an_exception_inside_a_block_leaves_nothing_behind(host):
    before = host(X)
    tuned = drawn(host)

    def fail(*_):
        raise ValueError

    handle = host.model.blocks[1].mlp.register_forward_hook(fail)
    with pytest.raises(ValueError):
        tuned(X)
    handle.remove()
    assert torch.equal(host(X), before)


def test_using_gives_the_tuned_stream_and_nests(host):
    tuned = drawn(host)
    bare = host.model(X)
    with host.using(tuned.task):
        inside = host.model(X)
        with host.using(None):
            assert torch.equal(host.model(X), bare)
        assert torch.equal(host.model(X), inside)
    assert not torch.allclose(inside, bare)
    assert torch.equal(host.model(X), bare)


def test_a_bypass_is_refused_inside_the_backbone(host):
    with (
        pytest.raises(WrongTaskError, match="beside the backbone"),
        host.using(drawn(host, "res-tuning-bypass").task),
    ):
        pass


def test_a_module_replaced_later_is_noticed(host):
    tuned = drawn(host)
    host.model.blocks[0].drop_path1 = nn.Identity()
    with pytest.raises(SiteNotReachedError, match=r"mha\.1"):
        tuned(X)


def test_the_backbone_stays_in_eval_when_training_starts(host):
    assert not any(m.training for m in drawn(host).train().host.model.modules())


def gradients(tuned):
    tuned.zero_grad()
    tuned(X).square().sum().backward()
    return [p.grad.clone() for p in tuned.task.parameters()]


def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_checkpointing_by_the_host_keeps_every_gradient_and_key(host):
    tuned, keys = drawn(host), list(host.model.state_dict())
    plain = gradients(tuned)
    host.checkpoint()
    assert list(host.model.state_dict()) == keys
    assert same(plain, gradients(tuned))
    host.checkpoint(False)
    assert same(plain, gradients(tuned))


@pytest.mark.parametrize("method", ["full", "bitfit"])
def test_checkpointing_by_the_host_keeps_the_gradients_of_trained_copies(host, method):
    tuned = drawn(host, method)
    plain = gradients(tuned)
    host.checkpoint()
    assert same(plain, gradients(tuned))
    assert any(g.abs().sum() > 0 for g in plain)
    assert all(p.grad is None for p in host.model.parameters())
    assert same(plain, gradients(copy.deepcopy(tuned)))


def test_foreign_checkpointing_is_refused_with_the_way_out(host):
    tuned = drawn(host)
    block = host.model.blocks[1]
    forward = block.forward
    block.forward = lambda x, **k: checkpoint(forward, x, use_reentrant=True)
    with pytest.raises(RecomputedError, match="host.checkpoint"):
        tuned(X).square().sum().backward()


def test_pickle_gives_an_equal_module(host):
    tuned = drawn(host)
    again = pickle.loads(pickle.dumps(tuned))  # noqa: S301
    assert torch.equal(again(X), tuned(X))


def test_one_forward_serves_many_bypass_tasks(host):
    tasks = [drawn(host, "res-tuning-bypass", seed=s) for s in range(4)]
    taps = host.features(X, keep=tasks[0].task.needs(host.readout_rule))
    for tuned in tasks:
        assert torch.equal(tuned.task(taps, host.readout), tuned(X))


def test_class_token_alone_gives_what_all_tokens_give(host):
    tuned = drawn(host, "res-tuning-bypass")
    needs = tuned.task.needs(host.readout_rule)
    assert needs.tokens == "cls"
    whole = tuned.task(host.features(X, keep=needs.taps), host.readout)
    assert torch.allclose(tuned(X), whole, atol=1e-6)


SIDES = ("res-tuning-bypass", "bypass-horizontal", "bypass-vertical")
ROUNDING = 1e-6
"""Of a dozen sums in fp32 of values near 1."""


@pytest.mark.parametrize("name", SIDES)
def test_a_bypass_starts_as_the_mean_of_its_taps_that_its_lambdas_say(host, name):
    task = methods.build(name, host, num_classes=4)
    taps = host.features(X, keep=task.needs(host.readout_rule))
    lambdas = [1.0, *[STARTING_LAMBDA] * (len(task.side.taps) - 1)]
    shares = [
        lam * (1 - STARTING_LAMBDA) ** (len(lambdas) - 1 - n) for n, lam in enumerate(lambdas)
    ]
    assert sum(shares) == pytest.approx(1)
    mean = sum(share * taps[tap] for share, tap in zip(shares, task.side.taps, strict=True))
    with torch.no_grad():
        torch.testing.assert_close(task.side(taps), mean, atol=ROUNDING, rtol=ROUNDING)


@pytest.mark.parametrize("name", SIDES)
def test_a_residual_bypass_starts_as_the_backbone_itself(host, name):
    task = methods.build(name, host, num_classes=4, residual=True)
    taps = host.features(X, keep=task.needs(host.readout_rule))
    with torch.no_grad():
        assert torch.equal(task.side(taps), taps[task.side.taps[-1]])


def test_a_bypass_is_the_linear_probe_as_its_last_gate_closes(host):
    task = methods.build("res-tuning-bypass", host, num_classes=4)
    probe = methods.build("linear", host, num_classes=4)
    probe.head.load_state_dict(task.head.state_dict())
    with torch.no_grad():
        for t in task.side.tuners:
            t.up.bias.zero_()
        task.side.gate[-1] = 40.0
        assert torch.allclose(Tuned(host, task)(X), Tuned(host, probe)(X), atol=1e-6)


@pytest.mark.parametrize("name", ["full", "bitfit"])
def test_trained_copies_start_as_the_backbone_and_leave_it_alone(host, name):
    task = methods.build(name, host, num_classes=4)
    probe = methods.build("linear", host, num_classes=4)
    probe.head.load_state_dict(task.head.state_dict())
    before = {k: v.clone() for k, v in host.model.state_dict().items()}
    tuned = Tuned(host, task)
    assert torch.allclose(tuned(X), Tuned(host, probe)(X), atol=1e-6)
    tuned(X).square().sum().backward()
    assert all(p.grad is not None for p in task.parameters())
    assert all(torch.equal(v, before[k]) for k, v in host.model.state_dict().items())
