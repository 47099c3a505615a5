"""`train_denoiser` in two processes makes the steps of one, whatever the method."""

import os

import pytest
import torch
import torch.distributed as dist

from awake import wake
from children import START
from diffusion.small import unet
from restuning import Host, methods
from restuning.diffusion import (
    DenoiserSettings,
    DenoiserTraining,
    EncodedPairs,
    Objective,
    linear_alphas,
    train_denoiser,
)

pytest.importorskip("diffusers")

RUNS = {
    "inline": {"a": "res-tuning[mha=adapter,cross=adapter,ffn=adapter]"},
    "bypass": {"a": "res-tuning-bypass"},
    "two bypasses on one backbone": {"a": "res-tuning-bypass", "b": "res-tuning-bypass"},
}
PROCESSES, STEPS, IMAGES, BATCH = 2, 4, 7, 4
"""Seven images in batches of four: the second batch of an epoch is shared out unevenly."""
SUM_ORDER = 1e-6
"""The gradient is summed in two parts: fp32 rounds in another order."""
ADAM = 1e-3
"""Adam divides a gradient by its own size: where it is nearly zero, rounding decides, which carries a
weight no further than a step."""
MOVED = 1e-4
"""What counts as trained: far more than the tolerance, or equality would say nothing."""


def build(names):
    """The same host and tasks in every process, with nothing asleep."""
    case = unet()
    host = Host(case.model, *case.args, **case.kwargs)
    tasks = {n: methods.build(method, host, rank=4) for n, method in names.items()}
    for number, task in enumerate(tasks.values()):
        wake(task, seed=4 + number)
    return host, tasks


def train(host, tasks, folder):
    draw = torch.Generator().manual_seed(5)
    mean = torch.randn(IMAGES, 4, 8, 8, generator=draw)
    data = EncodedPairs(
        mean,
        torch.full_like(mean, 0.1),
        {"encoder_hidden_states": torch.randn(3, 5, 8, generator=draw)},
        torch.arange(IMAGES) % 3,
        {"encoder_hidden_states": torch.zeros(1, 5, 8)},
        tuple("abcabca"),
        "test",
    )
    settings = DenoiserSettings(steps=STEPS, batch_size=BATCH, lr=1e-3, warmup_steps=0)
    objective = Objective("epsilon", linear_alphas())
    return train_denoiser(DenoiserTraining(host, tasks, data, objective, settings, folder))


def copied(tasks):
    return {n: t.detach().clone() for n, t in torch.nn.ModuleDict(tasks).state_dict().items()}


def one_of_two(rank, names, folder):
    torch.set_num_threads(1)
    # What Accelerate's launcher would set.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
    os.environ |= {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=PROCESSES)
    try:
        host, tasks = build(names)
        result = train(host, tasks, f"{folder}/two")
        grads = [p.grad for p in host.model.parameters() if p.grad is not None]
        torch.save([copied(tasks), result["loss"], len(grads)], f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module", params=list(RUNS))
def runs(request, tmp_path_factory):
    """Tasks before; tasks and loss of one process; what each of two left."""
    folder, names = tmp_path_factory.mktemp("ddp"), RUNS[request.param]
    torch.multiprocessing.start_processes(
        one_of_two, (names, str(folder)), PROCESSES, start_method=START
    )
    two = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]
    host, tasks = build(names)
    before = copied(tasks)
    result = train(host, tasks, folder / "one")
    return before, (copied(tasks), result["loss"]), two


def test_two_processes_end_with_the_tasks_of_one(runs):
    before, (one, _), two = runs
    moved = torch.cat([(one[n] - before[n]).abs().flatten() for n in one])
    for left, _, _ in two:
        apart = torch.cat([(one[n] - left[n]).abs().flatten() for n in one])
        assert apart.max() < ADAM
        assert apart.mean() < SUM_ORDER < MOVED < moved.mean()


def test_both_processes_hold_the_same_bits(runs):
    first, second = (left for left, _, _ in runs[2])
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_the_backbone_has_no_gradient_in_either(runs):
    assert [grads for _, _, grads in runs[2]] == [0, 0]
