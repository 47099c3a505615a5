"""A run that is killed again and again ends as if nothing had happened."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from children import Child

SCRIPT = Path(__file__).with_name("training_script.py")
SETTINGS = ("epochs=6", "batch_size=8", "checkpoint_every=4", "lr=0.01", "ema=0.9", "clip=1.0")
STEPS = 36
SLEEP = "0.01"
KILLS = 2
PATIENCE = 120
posix = pytest.mark.skipif(os.name == "nt", reason="SIGKILL is a signal of POSIX systems")


def start(out, sleep="0", *more):
    environment = {"TRAINING_SLEEP": sleep, "ACCELERATE_USE_CPU": "true"}
    return Child([SCRIPT, out, *SETTINGS, *more], environment)


def finish(process):
    _, errors = process.communicate(timeout=PATIENCE)
    return process.returncode, errors


def wait_for_steps(out, process, steps):
    """Until a checkpoint of at least so many steps is there, or the run has ended."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        names = [p.stem for p in (out / "checkpoints").glob("step-*.safetensors")]
        if any(int(n.split("-")[1]) >= steps for n in names):
            return
        time.sleep(0.01)


def lines(out):
    text = (out / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(t).items() if k != "seconds"} for t in text]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    status, errors = finish(start(out))
    assert status == 0, errors
    return out


def assert_as_unbroken(out, unbroken):
    ours, theirs = (load_file(o / "weights.safetensors") for o in (out, unbroken))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert lines(out) == lines(unbroken)
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["final.safetensors"]
    assert (out / "curves.png").stat().st_size > 0


@posix
def test_a_run_killed_at_random_moments_ends_bit_equal_to_an_unbroken_one(tmp_path, unbroken):
    chance = random.Random(7)
    killed = 0
    for kill in range(KILLS):
        process = start(tmp_path, SLEEP)
        wait_for_steps(tmp_path, process, steps=(kill + 1) * STEPS // (KILLS + 2))
        time.sleep(chance.uniform(0, 0.15))
        process.kill()
        killed += finish(process)[0] == -signal.SIGKILL
    assert killed == KILLS
    status, errors = finish(start(tmp_path))
    assert status == 0, errors
    assert_as_unbroken(tmp_path, unbroken)


@posix
def test_sigterm_leaves_a_checkpoint_of_the_step_it_fell_in(tmp_path, unbroken):
    process = start(tmp_path, SLEEP, "checkpoint_every=1000")
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and len(lines_or_none(tmp_path)) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    status, errors = finish(process)
    assert status == 128 + signal.SIGTERM, errors
    newest = max(p.stem for p in (tmp_path / "checkpoints").glob("step-*"))
    assert 0 < int(newest.split("-")[1]) < STEPS
    assert finish(start(tmp_path))[0] == 0
    assert_as_unbroken(tmp_path, unbroken)


def lines_or_none(out):
    try:
        return (out / "log.jsonl").read_text().splitlines()
    except OSError:
        return []


EARLY = ("epochs=30", "lr=0.3", "early_stopping=2", "keep_best=true", 'monitor="loss"')


@posix
@pytest.mark.slow
def test_a_killed_run_that_stops_early_leaves_the_best_weights_of_an_unbroken_one(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    status, errors = finish(start(whole, "0", *EARLY))
    assert status == 0, errors
    epochs = [line for line in lines(whole) if "val_loss" in line]
    assert len(epochs) < 30
    process = start(broken, SLEEP, *EARLY)
    # In the epochs without a new best, whose number and weights must not be lost.
    wait_for_steps(broken, process, steps=epochs[-2]["step"] - 2)
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    status, errors = finish(start(broken, "0", *EARLY))
    assert status == 0, errors
    assert_as_unbroken(broken, whole)
