"""What a bypass reads of a backbone, and that nothing else changes its answer."""

import pytest
import torch

from awake import tiny_vit, wake
from restuning import Host, Needs, Task, Tuned, methods
from restuning.tuners import Tuner
from zoo.table import NOT_YET, ZOO

NAMES = sorted(set(ZOO) - set(NOT_YET))


class Mixing(Tuner):
    """Adds the mean over tokens: every token's delta depends on all."""

    kind = "mixing"
    mixes_tokens = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.scale = torch.nn.Parameter(torch.ones(()))

    def reset_parameters(self) -> None:
        torch.nn.init.ones_(self.scale)

    def forward(self, x, view=None):
        return self.scale * x.mean(-2, keepdim=True).expand_as(x)


ROWS = 16


def repeated(value):
    if value.is_floating_point():
        return torch.randn(ROWS, *value.shape[1:], generator=torch.Generator().manual_seed(1))
    return value.repeat(ROWS, *[1] * (value.dim() - 1))


@pytest.fixture(params=NAMES)
def member(request):
    torch.manual_seed(0)
    model, args, kwargs = ZOO[request.param][0]()
    model = wake(model)
    return Host(model, *args, **kwargs), args, kwargs


def test_features_of_one_token_give_the_same_answer_as_all_tokens(member):
    host, args, kwargs = member
    torch.manual_seed(0)
    task = methods.build("res-tuning-bypass", host, num_classes=3, zero=False).eval()
    needs = task.needs(host.readout_rule)
    pool = host.readout_rule.pool
    if pool not in ("cls", "last"):
        assert needs.tokens == ("pool" if pool == "own" else "all")
        return
    assert needs.tokens == pool
    # A product of one row may take another kernel and round elsewhere; of several rows it does not.
    args = [repeated(a) for a in args]
    kwargs = {k: repeated(v) for k, v in kwargs.items()}
    with torch.no_grad():
        few = task(host.features(*args, keep=needs, **kwargs))
        whole = task(host.features(*args, keep=Needs(needs.taps, "all"), **kwargs))
    assert torch.equal(few, whole)


def test_kept_taps_are_one_vector_each_and_hold_no_more_memory():
    host = Host(tiny_vit(), torch.zeros(1, 3, 32, 32))
    task = methods.build("res-tuning-bypass", host, num_classes=3)
    taps = host.features(torch.randn(5, 3, 32, 32), keep=task.needs(host.readout_rule))
    assert set(taps) == set(host.sites.taps)
    for tap in taps.values():
        assert tap.shape == (5, 1, host.dim)
        assert tap.untyped_storage().nbytes() == tap.numel() * tap.element_size()


def test_a_mixing_tuner_gets_all_tokens():
    host = Host(tiny_vit(), torch.zeros(1, 3, 32, 32))
    task = Task.bypass(host.sites, lambda site: Mixing(site.dim))
    assert task.needs(host.readout_rule).tokens == "all"


@pytest.mark.parametrize("pool", ["mean", "all"])
def test_a_pooled_or_dense_readout_gets_all_tokens(pool):
    host = Host(tiny_vit(), torch.zeros(1, 3, 32, 32))
    task = methods.build("res-tuning-bypass", host, num_classes=3, pool=pool)
    assert task.needs(host.readout_rule).tokens == "all"


def test_a_live_bypass_keeps_nothing_for_backward_but_its_own():
    host = Host(tiny_vit(), torch.zeros(1, 3, 32, 32))
    tuned = Tuned(host, methods.build("res-tuning-bypass", host, num_classes=3))
    saved = set()

    def pack(tensor):
        saved.add(tuple(tensor.shape))
        return tensor

    tokens = host.features(torch.zeros(1, 3, 32, 32))["block.1"].shape[1]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        tuned(torch.randn(4, 3, 32, 32)).sum()
    assert saved
    assert not any(tokens in shape for shape in saved)
