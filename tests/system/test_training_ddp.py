"""Two processes make the same steps as one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from children import Child

SCRIPT = Path(__file__).with_name("training_script.py")
# 45 examples: the last batch of an epoch has 1 example with a batch of 4, none for one process.
SETTINGS = ("epochs=3", "batch_size=4", "lr=0.01", "noise=0.1", "ema=0.9", "clip=1.0")
SUM_ORDER = 1e-5
"""The gradient is summed in another order; AdamW's division keeps that small, not nothing."""
PATIENCE = 120


def launched(command, environment):
    """In two processes, as a user starts them; nearly all of its time is spent on imports."""
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", "0"]
    done = subprocess.run(
        [sys.executable, *launch, *map(str, command)],
        env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def forked(command, environment):
    """In two processes, with what the launcher tells them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment |= {"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    both = [
        Child(command, {**environment, "RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")
    ]
    for child in both:
        _, errors = child.communicate(timeout=PATIENCE)
        assert child.returncode == 0, errors[-3000:]


def alone(command, environment):
    child = Child(command, {**environment, "ACCELERATE_USE_CPU": "true"})
    _, errors = child.communicate(timeout=PATIENCE)
    assert child.returncode == 0, errors[-3000:]


def train(out, *more, start=alone):
    start([SCRIPT, out, *SETTINGS, *more], {"TRAINING_NO_DROPOUT": "1"})
    return load_file(out / "weights.safetensors")


def figures(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("start", [forked, pytest.param(launched, marks=pytest.mark.slow)])
def test_two_processes_end_with_the_weights_of_one(tmp_path, start):
    out, tmp_path = tmp_path / "one", tmp_path / "two"
    ours = train(out)
    theirs = train(tmp_path, "accumulate=2", start=start)
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], atol=SUM_ORDER), name
    for one, two in zip(figures(out), figures(tmp_path), strict=True):
        assert one.keys() == two.keys()
        assert one["step"] == two["step"]
        assert one["loss"] == pytest.approx(two["loss"], abs=SUM_ORDER)
        assert one.get("val_accuracy") == two.get("val_accuracy")
