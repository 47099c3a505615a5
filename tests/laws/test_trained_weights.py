"""Methods that train weights of the backbone never write to it: what runs is a copy of its structure."""

import copy
import functools
import types
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from awake import tiny_vit, wake
from restuning import Host, Task, Tuned, methods
from restuning._errors import BackboneError, WrongTaskError
from restuning.host.trained_copy import copy_with_weights

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
SUM_ORDER = 1e-6
TRAINED = ["full", "bitfit"]


def drawn(host, name="full", seed=0, **options):
    task = methods.build(name, host, num_classes=4, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in task.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return Tuned(host, task).eval()


def by_name(task):
    return {name.replace("/", "."): weight for name, weight in task.weights.items()}


def swapped(model, task, *args, **kwargs):
    """What torch's own call gives, which puts the weights into the model for a while."""
    return functional_call(copy.deepcopy(model), by_name(task), args, kwargs)


class Watched(dict):
    """A dictionary that takes no writing."""

    def _refuse(self, *_):
        raise AssertionError("the backbone was written")

    __setitem__ = __delitem__ = update = clear = pop = popitem = setdefault = _refuse


def freeze(model):
    """Make every write to a module an error."""
    for module in model.modules():
        for kind in ("_parameters", "_buffers", "_modules"):
            module.__dict__[kind] = Watched(module.__dict__[kind])
        kind = type(module)
        watched = {"__setattr__": Watched._refuse, "__delattr__": Watched._refuse}
        module.__class__ = type(kind.__name__, (kind,), watched)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("method", TRAINED)
def test_nothing_of_the_backbone_is_written_not_for_a_moment(method, checkpointed):
    host = Host(tiny_vit(), X[:1])
    host.checkpoint(checkpointed)
    tuned = drawn(host, method)
    freeze(host.model)
    for _ in range(2):
        tuned(X).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for n, p in tuned.task.named_parameters() if "head" in n)
    assert all(p.grad is None for p in host.model.parameters())


class Tied(nn.Module):
    """Tricks that models play: weights and modules that are referred to from anywhere."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.maps = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.maps[1].weight = self.maps[0].weight
        self.again = self.maps[2]
        self.memory = nn.LSTM(6, 6, batch_first=True)
        # In no module's table: a tuple, a dictionary, an object, a method, functions and a weak reference.
        self.hidden = (self.maps[3],)
        self.table = {"weights": [self.maps[0].bias]}
        self.helper = types.SimpleNamespace(map=self.maps[1])
        self.bound = self.maps[2].forward
        self.part = functools.partial(nn.Module.__call__, self.maps[3])
        plain = self.maps[0].forward
        self.count = [0]

        def counted(x, scale=2.0, *, extra=self.maps[2]):
            self.count[0] += 1
            return plain(x) * scale + extra(x)

        self.maps[0].forward = counted
        self.back = weakref.ref(self.maps[1])

    def forward(self, x):
        x = self.maps[0](x) + self.again(x) + self.hidden[0](x)
        x = x + self.table["weights"][0] + self.helper.map(x) + self.bound(x) + self.part(x)
        return self.norm((x + self.back()(x) + self.memory(x)[0]).flatten(0, 1))


def test_whatever_refers_to_a_weight_finds_the_one_that_took_its_place():
    torch.manual_seed(0)
    model = wake(Tied()).eval()
    weights = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    x = torch.randn(2, 3, 6)
    mixed = copy_with_weights(model, weights)
    plain = Tied().eval()
    plain.norm.load_state_dict(model.norm.state_dict())
    with torch.no_grad():
        for name, p in plain.named_parameters():
            p.copy_(weights[name])
    assert torch.equal(mixed(x), plain(x))
    assert model.count == [1] and mixed.count is model.count
    assert not torch.equal(model(x), plain(x))
    # What is frozen is shared, and statistics of a norm are among it.
    assert mixed.norm.running_mean is model.norm.running_mean


def test_one_weight_alone_is_replaced_at_all_its_places_and_the_others_are_shared():
    model = wake(Tied()).eval()
    weight = torch.randn(6, 6)
    mixed = copy_with_weights(model, {"maps.0.weight": weight})
    assert mixed.maps[0].weight is weight and mixed.maps[1].weight is weight
    others = dict(model.named_parameters())
    del others["maps.0.weight"]
    assert all(mixed.get_parameter(name) is p for name, p in others.items())


def test_a_copy_of_a_copy_pickled_or_deep_is_as_any_other_module():
    host = Host(tiny_vit(), X[:1])
    tuned = drawn(host)
    assert torch.equal(copy.deepcopy(tuned)(X), tuned(X))
    mixed = copy_with_weights(host.model, by_name(tuned.task))
    assert torch.equal(copy.deepcopy(mixed)(X), mixed(X))


@pytest.mark.parametrize("method", TRAINED)
def test_answers_and_gradients_are_those_of_weights_that_were_put_in_place(method):
    host = Host(tiny_vit(), X[:1])
    tuned = drawn(host, method)
    output = host.run_tuned({}, tuned.task.needs(host.readout_rule), X, weights=by_name(tuned.task))
    wanted = swapped(host.model, tuned.task, X)
    assert torch.equal(output[1], wanted)
    ours = torch.autograd.grad(output[1].square().sum(), list(tuned.task.weights.values()))
    theirs = torch.autograd.grad(wanted.square().sum(), list(tuned.task.weights.values()))
    assert all(map(torch.equal, ours, theirs))


def test_transforms_of_functions_reach_the_weights():
    host = Host(tiny_vit(), X[:1])
    tuned = drawn(host)
    weights = {n: p.detach() for n, p in tuned.named_parameters() if n.startswith("task.")}

    def loss(own, x):
        return functional_call(tuned, own, (x[None],)).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(weights, X)
    tuned(X[1:]).square().sum().backward()
    for name, p in tuned.task.named_parameters():
        close = (each[f"task.{name}"][1] - p.grad).abs().max()
        assert close <= 1e-4 * (1 + p.grad.abs().max())


def test_tuners_beside_trained_weights_borrow_the_projections_that_run():
    host = Host(tiny_vit(), X[:1])
    prompts = methods.build("res-tuning[mha=prompt,ffn=adapter]", host, num_classes=4)
    weights = {n: p.clone() for n, p in host.model.named_parameters()}
    task = wake(Task(tuners=prompts.inline_tuners, weights=weights, head=prompts.head))
    merged = copy.deepcopy(host.model)
    for module in merged.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    merged.load_state_dict(by_name(task), strict=False)
    alone = Host(merged, X[:1])
    plain = Task(tuners=task.inline_tuners, head=task.head)
    with torch.no_grad():
        close = (Tuned(host, task)(X) - Tuned(alone, plain)(X)).abs().max()
    assert close < SUM_ORDER


def test_a_module_that_was_compiled_in_place_runs_with_the_trained_weights():
    host = Host(tiny_vit(), X[:1])
    tuned = drawn(host)
    wanted = tuned(X)
    torch._dynamo.reset()
    host.model.blocks[0].compile(backend="eager")
    host.model.compile(backend="eager")
    assert torch.allclose(tuned(X), wanted, atol=1e-5)
    assert (host(X) - wanted[:, :1]).abs().max() > 1e-3


def test_checkpoints_that_a_backbone_brings_run_again_with_the_trained_weights():
    host = Host(tiny_vit(), X[:1])
    tuned = drawn(host)

    def gradients():
        tuned.zero_grad()
        tuned(X).square().sum().backward()
        return [p.grad.clone() for p in tuned.task.parameters()]

    plain = gradients()
    host.model.set_grad_checkpointing(True)
    assert all(map(torch.equal, plain, gradients()))


def test_no_tensor_is_copied_for_a_call():
    host = Host(tiny_vit(), X[:1])
    task = methods.build("bitfit", host, num_classes=4)
    mixed = copy_with_weights(host.model, by_name(task))
    ours = {t.data_ptr() for t in (*mixed.parameters(), *mixed.buffers())}
    known = (*host.model.parameters(), *host.model.buffers(), *task.parameters())
    assert ours <= {t.data_ptr() for t in known}


def test_scripted_parts_and_use_inside_the_backbone_are_refused_in_words():
    host = Host(tiny_vit(), X[:1])
    with (
        pytest.raises(WrongTaskError, match="weights of its own"),
        host.using(methods.build("full", host)),
    ):
        pass
    model = nn.Sequential(nn.Linear(3, 3), torch.jit.script(nn.Linear(3, 3)))
    with pytest.raises(BackboneError, match="scripted"):
        copy_with_weights(model, {"0.weight": torch.zeros(3, 3)})
