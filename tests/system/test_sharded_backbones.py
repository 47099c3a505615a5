"""A backbone in several processes (FSDP2, tensor parallelism) is known as the whole one, and saved once."""

import pytest
import torch
import torch.distributed as dist

from awake import tiny_vit
from children import START
from restuning import Host, Tuned, load, methods, save
from restuning._errors import BackboneChangedError

pytest.importorskip("torch.distributed.tensor")

PROCESSES = 2
ROUNDED = 1e-5
"""Products in parts are summed in another order."""
X = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)


def sharded(model, how):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (PROCESSES,))
    if how == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    for block in model.blocks:
        parallelize_module(block.mlp, mesh, {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()})
    return model


def one_of_two(rank, how, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES
    )
    try:
        plain = Host(tiny_vit(), X[:1])
        # Finding sites compares values, of which each process has a part.
        known = {"sites": plain.sites, "readout": plain.readout_rule}
        host = Host(sharded(tiny_vit(), how), X[:1], **known)
        assert host.fingerprint() == plain.fingerprint()
        assert host.digest() == plain.digest()
        assert host.identity()["digest"] == plain.identity()["digest"]
        torch.manual_seed(0)
        task = methods.build("linear", host, num_classes=3)
        logits = Tuned(host, task)(X)
        path = save(task, host, f"{folder}/t.task")
        dist.barrier()
        for on in (host, plain):
            again = Tuned(on, load(path, on))(X)
            assert torch.allclose(again, logits, atol=ROUNDED)
        # Of one shard only: each process looks at its own, and the digest at all of them.
        if rank == 1:
            weight = host.model.blocks[1].mlp.fc1.weight
            weight.to_local().data.mul_(1.5)
            try:
                host.check_unchanged()
            except BackboneChangedError as error:
                assert "fc1.weight" in error.found
            else:
                raise AssertionError("a changed shard was not noticed")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fsdp", "tensor parallel"])
def test_a_sharded_backbone_has_the_digest_of_the_whole_one(how, tmp_path):
    torch.multiprocessing.start_processes(
        one_of_two, (how, str(tmp_path)), PROCESSES, start_method=START
    )
    with Host(tiny_vit(), X[:1]) as host:
        load(tmp_path / "t.task", host)
