"""Laws of attaching, over every backbone of the zoo."""

import copy

import pytest
import torch

from awake import wake
from restuning import Host, Needs, NoSitesError, Task, Tuned, Tuner, methods
from restuning.sites import first_tensor
from restuning.sites.linear import is_linear
from zoo.table import NOT_YET, ZOO

STEP = 0.25
ROUNDING = 1e-4
"""fp32 sums of woken streams of size about 10 move by a constant to within a few ulp of 10."""


class Constant(Tuner):
    """Adds one number."""

    kind = "constant"

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def reset_parameters(self):
        pass

    def forward(self, x, view=None):
        return torch.full_like(x, STEP)


@pytest.fixture(params=[n for n in ZOO if n not in NOT_YET])
def member(request):
    torch.manual_seed(0)
    make, layers, maps = ZOO[request.param]
    model, args, kwargs = make()
    wake(model)
    return model, args, kwargs, layers, maps


def test_the_bare_host_is_the_backbone_bit_for_bit_with_its_own_keys(member):
    model, args, kwargs, _, _ = member
    keys = list(model.state_dict())
    with torch.no_grad():
        before = first_tensor(model(*args, **kwargs))
        host = Host(model, *args, **kwargs)
        after = first_tensor(host(*args, **kwargs))
    assert torch.equal(before, after)
    assert list(model.state_dict()) == keys


def test_every_layer_has_its_three_sites_and_the_maps_the_table_says(member):
    model, args, kwargs, layers, maps = member
    host = Host(model, *args, **kwargs)
    for op in ("mha", "ffn"):
        assert len(host.sites.pick(op)) == layers
    class_attention = 2 if type(model).__name__ == "Cait" else 0
    assert len(host.sites.pick("block")) == host.sites.layers == layers + class_attention
    assert all(bool(s.projections) == maps for s in host.sites.values())
    assert all(s.proof == "residual" for s in host.sites.pick("ffn").values())


def test_a_constant_tuner_moves_the_stream_by_exactly_that_constant(member):
    model, args, kwargs, layers, _ = member
    host = Host(model, *args, **kwargs)
    for site in host.sites.pick("block", "mha", layers=[layers]).values():
        if site.proof != "residual":
            continue
        seen = []
        following = [s for s in host.sites.values() if s.layer == layers and s.op == "ffn"][0]
        path = following.enter if site.op == "mha" else ""
        tap = f"block.{layers}"

        def note(module, arguments, keywords, seen=seen):
            seen.append(first_tensor(arguments).clone())

        handle = (
            model.get_submodule(path).register_forward_pre_hook(note, with_kwargs=True)
            if path
            else None
        )
        before = host.features(*args, keep=[tap], **kwargs)[tap]
        task = Task.inline(host.sites, lambda s, site=site: Constant(s.dim) if s is site else None)
        with host.using(task), torch.no_grad():
            model(*args, **kwargs)
        after = Tuned(host, task).host.run_tuned(
            task.inline_tuners, Needs((tap,)), *args, **kwargs
        )[0][tap]
        if handle is not None:
            handle.remove()
            # A post-norm block normalises the sum before the FFN reads it.
            if "norm" in site.leave or "output.dropout" in site.leave:
                continue
            moved = seen[1] - seen[0]
            if site.op == "mha" and moved.shape == seen[0].shape:
                assert (moved - STEP).abs().max() < ROUNDING
        elif after.shape == before.shape:
            assert (after - before - STEP).abs().max() < ROUNDING


@pytest.mark.parametrize("method", ["res-tuning", "res-tuning-bypass"])
def test_a_step_gives_gradients_to_the_task_alone_and_to_all_of_it(member, method):
    model, args, kwargs, _, _ = member
    host = Host(model, *args, **kwargs)
    task = methods.build(method, host, num_classes=3)
    with torch.no_grad():
        for p in task.parameters():
            p.copy_(torch.randn_like(p) * 0.2)
    forwards, backwards = [], []
    model.register_forward_hook(lambda *_: forwards.append(1))
    first_map = next(m for m in model.modules() if is_linear(m))
    first_map.register_full_backward_hook(lambda *_: backwards.append(1))
    logits = Tuned(host, task).train()(*args, **kwargs)
    logits.square().sum().backward()
    assert len(forwards) == 1
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in task.parameters())
    if method == "res-tuning-bypass":
        assert not backwards
        taps = host.features(*args, keep=task.needs(host.readout_rule), **kwargs)
        assert all(t.grad_fn is None for t in taps.values())


def test_a_deepcopy_is_equal_and_independent(member):
    model, args, kwargs, _, _ = member
    host = Host(model, *args, **kwargs)
    tuned = Tuned(host, methods.build("res-tuning", host, num_classes=3)).eval()
    copied = copy.deepcopy(tuned)
    with torch.no_grad():
        expected = tuned(*args, **kwargs)
        for p in copied.task.parameters():
            p.zero_()
        copied(*args, **kwargs)
        assert torch.equal(tuned(*args, **kwargs), expected)


@pytest.mark.parametrize("name", sorted(NOT_YET))
def test_a_backbone_without_sites_is_refused_in_words(name):
    model, args, kwargs = ZOO[name][0]()
    with pytest.raises(NoSitesError, match="no place to tune"):
        Host(model.eval(), *args, **kwargs)
