"""What a bypass on maps shares with every bypass: banks, fused steps, a state inside the network."""

import pytest
import timm
import torch
from torch import nn

from awake import wake
from restuning import Bank, Host, MultiTask, Tuned, methods
from restuning._errors import FormatError, TunerShapeError
from restuning.bypass import Bypass
from restuning.sites import covers_tokens, resolve_tokens

SAME_TOLERANCE = 1e-4
"""The same sums in another order, in fp32, of features of size about ten."""
X = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    """A block that keeps width and grid."""

    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()

    def forward(self, x):
        return x + self.act(self.conv(x))


class OneWidth(nn.Module):
    """A network of one width; its grid is halved on the way if it pools."""

    def __init__(self, pools=False):
        super().__init__()
        self.stem, self.pools = nn.Conv2d(3, 8, 4, 4), pools
        self.first, self.second = nn.Sequential(Block(), Block()), nn.Sequential(Block(), Block())

    def forward(self, x):
        x = self.first(self.stem(x))
        x = nn.functional.avg_pool2d(x, 2) if self.pools else x
        return self.second(x).mean((2, 3))


def host_on(model):
    torch.manual_seed(0)
    return Host(wake(model), X[:1])


def awake(task):
    with torch.no_grad():
        for p in task.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    return task.eval()


def build(host, classes=3, method="res-tuning-bypass", **options):
    return awake(methods.build(method, host, num_classes=classes, **options))


@pytest.mark.parametrize(
    "make", [OneWidth, lambda: timm.create_model("test_resnet", num_classes=0)]
)
def test_a_bank_of_maps_answers_as_each_task_alone(make):
    host = host_on(make())
    tasks = {
        "a": build(host, 3),
        "b": build(host, 5, rank=7),
        "c": build(host, 2, method="linear"),
        "d": build(host, 4, method="bypass-horizontal"),
    }
    together = MultiTask(host, tasks)
    assert together.forwards == 1
    assert together.keep.tokens == "pool"
    with torch.no_grad():
        answers = together(X)
        for name, task in tasks.items():
            alone = Tuned(host, task)(X)
            assert torch.allclose(
                answers[name], alone, atol=SAME_TOLERANCE * float(alone.abs().max())
            )


def test_a_bypass_of_one_width_runs_fused_on_pooled_vectors_and_equals_the_written_one(monkeypatch):
    host = host_on(OneWidth())
    task = build(host)
    features = host.features(X, keep=task.needs(host.readout_rule))
    assert task.side.can_fuse([features[tap] for tap in task.side.taps])
    fused = task(features).detach()
    monkeypatch.setattr(Bypass, "can_fuse", lambda self, streams: False)
    assert torch.allclose(task(features), fused, atol=SAME_TOLERANCE * float(fused.abs().max()))


def test_a_bypass_of_several_widths_or_grids_runs_as_it_is_written():
    wide = host_on(timm.create_model("test_resnet", num_classes=0))
    task = build(wide)
    features = wide.features(X, keep=task.needs(wide.readout_rule))
    assert not task.side.can_fuse([features[tap] for tap in task.side.taps])
    grids = host_on(OneWidth(pools=True))
    task = build(grids, pool="mean")
    features = grids.features(X, keep=task.needs(grids.readout_rule))
    assert not task.side.can_fuse([features[tap] for tap in task.side.taps])
    assert task(features).shape == (3, 3)


def test_a_bank_refuses_streams_whose_grid_changes_and_tasks_that_read_differently():
    host = host_on(OneWidth(pools=True))
    dense, pooled = build(host, pool="mean"), build(host)
    with pytest.raises(TunerShapeError, match="do not stack"):
        MultiTask(host, {"a": dense})(X)
    with pytest.raises(FormatError, match="read the backbone alike"):
        Bank({"dense": dense, "pooled": pooled})


@pytest.mark.parametrize(
    "make",
    [
        OneWidth,
        lambda: OneWidth(pools=True),
        lambda: timm.create_model("resnet18", num_classes=0),
        lambda: timm.create_model("test_convnext", num_classes=0),
    ],
)
def test_a_bypass_without_a_head_starts_as_the_network_of_maps_and_then_changes_it(make):
    host = host_on(make())
    task = methods.build("res-tuning-bypass", host)
    with torch.no_grad():
        bare = host.model(X)
        assert torch.equal(Tuned(host, task)(X), bare)
        awake(task)
        assert not torch.allclose(Tuned(host, task)(X), bare)
        with host.using(task):
            used = host.model(X)
        assert torch.equal(used, Tuned(host, task)(X))
    Tuned(host, task)(X).sum().backward()
    assert all(p.grad is not None for p in task.parameters())


def test_only_all_tokens_hold_other_tokens_and_none_hold_what_is_pooled():
    kinds = [resolve_tokens(pool) for pool in ("cls", "last", "own", "mean", "all", None)]
    assert kinds == ["cls", "last", "pool", "all", "all", "all"]
    pairs = {(a, b) for a in set(kinds) for b in set(kinds) if covers_tokens(a, b)}
    assert pairs == {(k, k) for k in set(kinds)} | {("all", "cls"), ("all", "last")}
