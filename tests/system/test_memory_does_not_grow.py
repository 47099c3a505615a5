"""Forwards and attachments leave nothing behind."""

import gc
import weakref

import pytest
import torch

from awake import tiny_vit
from restuning import Host, MultiTask, Tuned, methods
from restuning.host import call as record

FORWARDS, CYCLES = 1000, 100
EARLY = 10
"""Turns after which caches of the first calls are there."""


def find_tensors():
    gc.collect()
    # By type, not isinstance: that would wake lazy proxies of other libraries.
    return [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]


class Newer:
    """Counts tensors made since: what tests before this one left, and lose meanwhile, is not
    counted. The old ones are held, so that none of the new has an old one's address."""

    def __init__(self):
        self.old = find_tensors()
        self.addresses = {id(each) for each in self.old}

    def count(self):
        return sum(id(each) not in self.addresses for each in find_tensors())


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize(
    "method",
    [
        "res-tuning-bypass",
        *(pytest.param(m, marks=pytest.mark.slow) for m in ("res-tuning", "prefix", "bank")),
    ],
)
def test_a_thousand_forwards_leave_no_tensor_behind(method):
    newer = Newer()
    host = Host(tiny_vit(depth=1, embed_dim=16, num_heads=2), torch.zeros(1, 3, 32, 32))
    if method == "bank":
        tasks = {n: methods.build("res-tuning-bypass", host, num_classes=2) for n in "abc"}
        run = MultiTask(host, tasks)
    else:
        run = Tuned(host, methods.build(method, host, num_classes=2))
    x = torch.randn(1, 3, 32, 32)

    def turn():
        answer = run(x)
        if method != "bank":
            answer.sum().backward()

    for _ in range(EARLY):
        turn()
    before = newer.count()
    for _ in range(FORWARDS):
        turn()
    assert newer.count() == before


def test_a_hundred_attachments_leave_no_hook_host_or_tensor_behind():
    newer = Newer()
    model, x = tiny_vit(depth=1, embed_dim=16, num_heads=2), torch.randn(1, 3, 32, 32)
    bare = hooks(model)
    hosts = []

    def turn():
        with Host(model, x) as host:
            hosts.append(weakref.ref(host))
            assert hooks(model) > bare
            Tuned(host, methods.build("res-tuning", host, num_classes=2))(x).sum().backward()

    for _ in range(EARLY):
        turn()
    before, records = newer.count(), len(vars(record._local)) + len(record.trained_slots)
    for _ in range(CYCLES):
        turn()
    assert newer.count() == before
    assert len(vars(record._local)) + len(record.trained_slots) == records
    assert hooks(model) == bare
    gc.collect()
    assert not any(host() is not None for host in hosts)
