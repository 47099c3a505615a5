"""A released backbone is what it was before: gradients, modes, hooks, checkpoints, whatever the order."""

import contextlib
import gc
import weakref

import pytest
import torch
from torch import nn

from awake import tiny_vit
from restuning import Branch, Host, Layer, NoSitesError, Sites, Tuned, methods
from restuning.bench.rivals.inside import copy_backbone

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def partly_trained() -> nn.Module:
    """Some parameters frozen, some modules in eval mode: no single call makes it so again."""
    model = tiny_vit().train()
    model.blocks[0].requires_grad_(False)
    model.norm.bias.requires_grad_(False)
    model.blocks[1].mlp.eval()
    return model


def state(model):
    return (
        {name: p.requires_grad for name, p in model.named_parameters()},
        {name: type(m) for name, m in model.named_modules()},
        {name: m.training for name, m in model.named_modules()},
        [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)],
    )


def frozen(model):
    return not any(p.requires_grad for p in model.parameters()) and not any(
        m.training for m in model.modules()
    )


def used(model):
    host = Host(model, X[:1])
    tuned = Tuned(host, methods.build("res-tuning", host, num_classes=3)).train()
    tuned(X).sum().backward()
    host.release()
    # What still holds the host must not freeze the backbone again.
    tuned.eval().train()


def in_a_block(model):
    with Host(model, X[:1]) as host:
        host.features(X)


def left_by_an_exception(model):
    with contextlib.suppress(KeyError), Host(model, X[:1]):
        raise KeyError


def refused(model):
    declared = Sites.declare([Layer("nowhere", mha=Branch("attn", "norm"))])
    with pytest.raises(NoSitesError):
        Host(model, X[:1], sites=declared)


def interrupted(model):
    handle = model.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Host(model, X[:1])
    handle.remove()


def checkpointed(model):
    host = Host(model, X[:1])
    host.checkpoint()
    host.release()


def two_hosts(model):
    first, second = Host(model, X[:1]), Host(model, X[:1])
    first.release()
    assert frozen(model)
    second.features(X)
    second.release()


def two_hosts_the_other_way(model):
    first, second = Host(model, X[:1]), Host(model, X[:1])
    second.release()
    assert frozen(model)
    first.features(X)
    first.release()
    first.release()


def one_that_took_the_place_of_another(model):
    host = Host(model, X[:1])
    host = Host(model, X[:1])
    host.release()


@pytest.mark.parametrize(
    "use",
    [
        used,
        in_a_block,
        left_by_an_exception,
        refused,
        interrupted,
        checkpointed,
        two_hosts,
        two_hosts_the_other_way,
        one_that_took_the_place_of_another,
    ],
)
def test_a_backbone_is_given_back_as_it_was(use):
    model = partly_trained()
    before = state(model)
    use(model)
    assert state(model) == before


def test_a_host_on_a_part_and_one_on_the_whole_give_back_what_each_found():
    whole = nn.Sequential(partly_trained(), nn.Linear(48, 5))
    before = state(whole)
    part = Host(whole[0], X[:1])
    both = Host(whole, X[:1])
    part.release()
    assert frozen(whole)
    both.release()
    assert state(whole) == before


def test_a_host_that_is_deleted_does_not_keep_the_backbone_from_the_next():
    model = partly_trained()
    gone = weakref.ref(Host(model, X[:1]))
    gc.collect()
    assert gone() is None
    model.train().requires_grad_(True)
    with Host(model, X[:1]):
        assert frozen(model)
    assert all(p.requires_grad for p in model.parameters())
    assert all(m.training for m in model.modules())


def test_a_copy_of_a_hosted_backbone_stays_frozen_when_it_is_released():
    model = partly_trained()
    before = state(model)
    host = Host(model, X[:1])
    assert frozen(copy_backbone(host))
    host.release()
    assert state(model) == before


def test_checkpoints_of_others_are_left_where_they_are():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = partly_trained()
    with Host(model, X[:1]) as host:
        model.blocks[0] = checkpoint_wrapper(model.blocks[0])
        host.checkpoint()
    kinds = [type(b).__name__ for b in model.blocks]
    assert kinds == ["CheckpointWrapper", "Block", "Block"]
