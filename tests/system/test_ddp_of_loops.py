"""Trainer and Lightning in two processes (DDP over gloo) make the steps of one on the whole batch."""

from pathlib import Path

import pytest
import torch
from launching import alone, forked
from safetensors.torch import load_file

pytest.importorskip("transformers")
pytest.importorskip("lightning")

SCRIPT = Path(__file__).with_name("loops_script.py")
SUM_ORDER = 1e-5
"""The gradient is summed in halves: fp32 rounds in another order, and six steps carry it on."""
MOVED = 5 * SUM_ORDER
"""What counts as trained: more than the tolerance, or equality would say nothing."""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["res-tuning", "res-tuning-bypass"])
@pytest.mark.parametrize("loop", ["trainer", "lightning"])
def test_two_processes_end_alike_and_as_one_with_the_whole_batch(loop, method, tmp_path):
    alone([SCRIPT, loop, method, tmp_path])
    forked([SCRIPT, loop, method, tmp_path])
    one, first, second = (
        load_file(tmp_path / f"{name}.safetensors") for name in ("1-0", "2-0", "2-1")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.testing.assert_close(first, one, atol=SUM_ORDER, rtol=SUM_ORDER)
    from loops import build

    start = build(method)[1].state_dict()
    assert all((one[name] - tensor).abs().max() > MOVED for name, tensor in start.items())
    if loop == "trainer":
        (held,) = tmp_path.glob("checkpoint-*/model.safetensors")
        # Both runs leave it at one place, the second last.
        state = {n.removeprefix("task."): t for n, t in load_file(held).items()}
        assert all(torch.equal(state[name], first[name]) for name in start)
