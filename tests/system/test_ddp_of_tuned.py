"""`Tuned` inside torch's own DistributedDataParallel: two processes make the steps of one."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch.nn.parallel import DistributedDataParallel

from awake import tiny_vit, wake
from children import START
from restuning import Host, Tuned, methods

METHODS = ("res-tuning", "res-tuning-bypass")
PROCESSES, STEPS, BATCH, CLASSES = 2, 4, 8, 5
SUM_ORDER = 1e-5
"""The gradient is summed in halves: fp32 rounds in another order, and four steps carry it on."""
MOVED = 5 * SUM_ORDER
"""What counts as trained: more than the tolerance, or equality would say nothing."""


def example():
    return torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)


def build(method):
    """The same host and task in every process, with nothing asleep."""
    host = Host(tiny_vit(seed=3), example())
    task = methods.build(method, host, num_classes=CLASSES, rank=3)
    wake(task, seed=4)
    return host, task


def batches():
    generator = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        images = torch.randn(BATCH, 3, 32, 32, generator=generator)
        yield images, torch.randint(CLASSES, (BATCH,), generator=generator)


def steps(model, task, share=slice(None)):
    optimiser = torch.optim.SGD(task.parameters(), lr=0.1, momentum=0.9)
    model.train()
    for images, labels in batches():
        optimiser.zero_grad()
        F.cross_entropy(model(images[share]), labels[share]).backward()
        optimiser.step()


def copied(module):
    return {n: t.detach().clone() for n, t in module.state_dict().items()}


def one_of_two(rank, method, folder):
    torch.set_num_threads(1)
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=PROCESSES)
    try:
        host, task = build(method)
        if rank:
            # DDP must bring the first process's task to all others.
            wake(task, seed=99)
        before = copied(host)
        model = DistributedDataParallel(Tuned(host, task))
        half = BATCH // PROCESSES
        steps(model, task, slice(rank * half, (rank + 1) * half))
        states = {"task": copied(task), "before": before, "host": copied(host)}
        states["frozen"] = [p.grad is None for p in host.parameters()]
        torch.save(states, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module", params=METHODS)
def runs(request, tmp_path_factory):
    """The task before and after in one process, and what each of the two left."""
    folder = tmp_path_factory.mktemp("ddp")
    torch.multiprocessing.start_processes(
        one_of_two, (request.param, str(folder)), PROCESSES, start_method=START
    )
    two = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]
    host, task = build(request.param)
    before = copied(task)
    steps(Tuned(host, task), task)
    return before, copied(task), two


def test_two_processes_end_with_the_parameters_of_one_on_the_whole_batch(runs):
    _, one, two = runs
    for left in two:
        torch.testing.assert_close(left["task"], one, atol=SUM_ORDER, rtol=SUM_ORDER)


def test_both_processes_hold_the_same_bits(runs):
    first, second = (left["task"] for left in runs[2])
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_every_parameter_of_the_task_was_trained(runs):
    before, _, two = runs
    still = [n for n in before if (two[0]["task"][n] - before[n]).abs().max() < MOVED]
    assert not still


def test_nothing_but_the_task_changed(runs):
    for left in runs[2]:
        changed = [n for n, t in left["before"].items() if not torch.equal(t, left["host"][n])]
        assert not changed
        assert all(left["frozen"])
