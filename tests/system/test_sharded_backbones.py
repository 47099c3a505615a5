"""A backbone in several processes (FSDP2, tensor parallelism) is the whole one: sites, answers, training, files."""

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Subset

from awake import tiny_vit, wake
from children import START
from restuning import (
    FitSettings,
    Host,
    RestuningError,
    Tuned,
    evaluate,
    fit,
    load,
    load_backbone,
    load_data,
    merge,
    methods,
    save,
)
from restuning._errors import BackboneChangedError
from restuning.features import StoreOptions, open_or_build

pytest.importorskip("torch.distributed.tensor")

PROCESSES, CLASSES = 2, 3
SAME = 1e-6
"""Weights are put together as they were; gradients of two halves are summed in another order."""
ROUNDED = 1e-5
"""Of tensor parallelism products in parts are summed in another order."""
X = torch.linspace(-1, 1, 4 * 3 * 32 * 32).reshape(4, 3, 32, 32)
Y = torch.arange(4) % CLASSES
METHODS = ("linear", "res-tuning", "res-tuning-bypass", "prefix", "lora")


def shard(model, mesh, **options):
    from torch.distributed.fsdp import fully_shard

    # A norm of its own as well: nothing puts it together for a readout of stored features.
    for module in (*model.blocks, model.norm, model):
        fully_shard(module, mesh=mesh, **options)
    return model


def host_in_shards(order, mesh, make=tiny_vit):
    """FSDP2 put around the backbone before or after its host was built."""
    if order == "before":
        return Host(shard(make(), mesh, reshard_after_forward=True), X[:1])
    host = Host(make(), X[:1])
    shard(host.model, mesh)
    return host


def is_close(ours, theirs, tolerance=SAME):
    return torch.allclose(ours.float(), theirs.float(), atol=tolerance, rtol=0)


def step(model, task, share):
    """Gradients of a step on a share of the rows, and the logits of all rows after it."""
    F.cross_entropy(model(X[share]), Y[share]).backward()
    gradients = [parameter.grad.clone() for parameter in task.parameters()]
    with torch.no_grad():
        for parameter in task.parameters():
            parameter -= 0.1 * parameter.grad
            parameter.grad = None
        return gradients, model(X)


def check(host, plain, rank, processes, folder):
    """All that a host is asked, of one in shards and of a whole one."""
    assert list(host.sites.items()) == list(plain.sites.items())
    assert list(host.sites.linear.items()) == list(plain.sites.linear.items())
    assert all(site.projections is not None for site in host.sites.pick("mha").values())
    assert host.readout_rule == plain.readout_rule
    ours, theirs = host.features(X), plain.features(X)
    assert all(is_close(ours[tap], theirs[tap]) for tap in theirs)
    last = theirs[plain.sites.taps[-1]]
    assert is_close(host.readout(last), plain.readout(last))
    assert host.fingerprint() == plain.fingerprint() and host.digest() == plain.digest()
    assert host.identity()["digest"] == plain.identity()["digest"]
    rows = len(X) // processes
    for method in METHODS:
        task, other = (wake(methods.build(method, h, num_classes=CLASSES)) for h in (host, plain))
        # DDP leaves alone what is in shards, and brings all processes the mean of their gradients.
        tuned = DistributedDataParallel(Tuned(host, task))
        gradients, logits = step(tuned, task, slice(rank * rows, (rank + 1) * rows))
        wanted, answers = step(Tuned(plain, other), other, slice(None))
        assert all(map(is_close, gradients, wanted)) and is_close(logits, answers)
        assert max(float(g.abs().max()) for g in wanted) > 100 * SAME
        # The first process writes, and all of them are asked what the backbone is.
        saved = {"shards": (task, host), "whole": (other, plain)}
        paths = [save(*each, f"{folder}/{method}-{name}.task") for name, each in saved.items()]
        dist.barrier()
        for on in (host, plain):
            assert all(is_close(Tuned(on, load(path, on))(X), answers) for path in paths)
    host.check_unchanged()


def one_of_two(rank, how, folder, port):
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    # As a launcher tells each of its processes.
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES
    )
    try:
        plain, mesh = Host(tiny_vit(), X[:1]), init_device_mesh("cpu", (PROCESSES,))
        if how == "runs":
            check_runs(mesh, folder)
            return
        if how == "tensor parallel":
            host = check_parts(plain, mesh, folder)
        else:
            host = host_in_shards(how, mesh)
            check(host, plain, rank, PROCESSES, folder)
        # Of one shard only: each process looks at its own, and the digest at all of them.
        if rank == 1:
            host.model.blocks[1].mlp.fc1.weight.to_local().data.mul_(1.5)
            with pytest.raises(BackboneChangedError) as told:
                host.check_unchanged()
            assert "fc1.weight" in told.value.found
    finally:
        dist.destroy_process_group()


def check_parts(plain, mesh, folder):
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    model = tiny_vit()
    for block in model.blocks:
        parallelize_module(block.mlp, mesh, {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()})
    # Finding sites compares values, of which each process has a part here.
    host = Host(model, X[:1], sites=plain.sites, readout=plain.readout_rule)
    assert host.fingerprint() == plain.fingerprint() and host.digest() == plain.digest()
    assert host.identity()["digest"] == plain.identity()["digest"]
    task = wake(methods.build("res-tuning", host, num_classes=CLASSES))
    logits = Tuned(host, task)(X)
    path = save(task, host, f"{folder}/t.task")
    dist.barrier()
    assert all(is_close(Tuned(on, load(path, on))(X), logits, ROUNDED) for on in (host, plain))
    return host


def check_runs(mesh, folder):
    """Training with validation, evaluation and a store: rows of no process are fewer than another's."""
    loaded, other = (load_backbone("restuning-tiny") for _ in range(2))
    plain = other.host()
    shard(loaded.model, mesh)
    host = Host(loaded.model, *loaded.example)
    digits = load_data("digits", loaded)
    rows, val = Subset(digits.train, range(7)), Subset(digits.val, range(5))
    for method in ("res-tuning", "mixing-bypass", "ridge"):
        found = []
        for name, on in (("shards", host), ("whole", plain)):
            torch.manual_seed(0)
            tuned = Tuned(on, methods.build(method, on, num_classes=10))
            settings = FitSettings(epochs=2, batch_size=2)
            out = f"{folder}/{method}-{name}"
            result = fit(tuned, rows, val, settings=settings, out=out, progress=False)
            found.append((result.val_loss, evaluate(tuned, val)["loss"], tuned.task.state_dict()))
        (val_loss, loss, state), (wanted_val, wanted, wanted_state) = found
        assert abs(val_loss - wanted_val) < ROUNDED and abs(loss - wanted) < ROUNDED
        assert all(is_close(state[name], wanted_state[name], ROUNDED) for name in state)
    few = replace(digits, train=rows, val=val, test=val)
    needs = methods.build("res-tuning-bypass", plain, num_classes=10).needs(plain.readout_rule)
    stores = [
        open_or_build(on, each, few, needs, StoreOptions(Path(folder, name), batch_size=2)).store
        for name, on, each in (("shards", host, loaded), ("whole", plain, other))
    ]
    assert stores[0].path.name == stores[1].path.name
    for split, data in (("train", rows), ("val", val)):
        ours, theirs = (store.rows(split, 0, range(len(data))) for store in stores)
        assert is_close(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["before", "after", "runs", "tensor parallel"])
def test_a_backbone_in_two_processes_is_the_whole_one(how, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    torch.multiprocessing.start_processes(
        one_of_two, (how, str(tmp_path), port), PROCESSES, start_method=START
    )


@pytest.fixture
def mesh():
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_backbone_in_shards_is_the_whole_one(order, mesh, tmp_path):
    check(host_in_shards(order, mesh), Host(tiny_vit(), X[:1]), 0, 1, tmp_path)


def test_projections_of_shards_in_half_precision_are_proved(mesh):
    host, plain = (
        host_in_shards("before", mesh, lambda: tiny_vit().to(torch.bfloat16)),
        Host(tiny_vit().to(torch.bfloat16), X[:1]),
    )
    assert list(host.sites.items()) == list(plain.sites.items())
    task = wake(methods.build("prefix", plain, num_classes=CLASSES))
    assert is_close(Tuned(host, task)(X), Tuned(plain, task)(X))


def test_what_changes_while_a_backbone_is_shared_out_is_noticed(mesh):
    host = Host(tiny_vit(), X[:1])
    with torch.no_grad():
        host.model.blocks[1].mlp.fc1.weight[3, 4] += 1
    shard(host.model, mesh)
    with pytest.raises(BackboneChangedError, match=r"blocks\.1\.mlp\.fc1\.weight\n"):
        host.features(X)


@pytest.mark.parametrize("method", ["full", "bitfit", "lora"])
def test_shards_are_not_copied_to_be_trained_and_nothing_is_merged_into_them(method, mesh):
    host = host_in_shards("before", mesh)
    with pytest.raises(RestuningError, match="shared out among processes"):
        merge(wake(methods.build(method, host, num_classes=CLASSES)), host)
