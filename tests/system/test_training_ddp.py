"""Two processes make the same steps as one."""

import json
from pathlib import Path

import pytest
import torch
from launching import alone, forked, launched
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("training_script.py")
# 45 examples: the last batch of an epoch has 1 example with a batch of 4, none for one process.
SETTINGS = ("epochs=3", "batch_size=4", "lr=0.01", "noise=0.1", "ema=0.9", "clip=1.0")
SUM_ORDER = 1e-5
"""The gradient is summed in another order; AdamW's division keeps that small, not nothing."""
SUM_ORDER_AT_A_HIGH_RATE = 1e-3
"""Steps of 0.3, thirty times as long, carry it further."""


def train(out, *more, start=alone):
    start([SCRIPT, out, *SETTINGS, *more], {"TRAINING_NO_DROPOUT": "1"})
    return load_file(out / "weights.safetensors")


def figures(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("start", "more"),
    [
        (forked, ()),
        # As of a store that is larger than memory, of which each process reads rows of its own.
        (forked, ("portions=[3,2,2]",)),
        pytest.param(launched, (), marks=pytest.mark.slow),
    ],
)
def test_two_processes_end_with_the_weights_of_one(tmp_path, start, more):
    out, tmp_path = tmp_path / "one", tmp_path / "two"
    ours = train(out, *more)
    theirs = train(tmp_path, "accumulate=2", *more, start=start)
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], atol=SUM_ORDER), name
    for one, two in zip(figures(out), figures(tmp_path), strict=True):
        assert one.keys() == two.keys()
        assert one["step"] == two["step"]
        assert one["loss"] == pytest.approx(two["loss"], abs=SUM_ORDER)
        assert one.get("val_accuracy") == two.get("val_accuracy")


@pytest.mark.slow
def test_two_processes_end_early_together_and_both_leave_the_best_weights(tmp_path):
    more = ("epochs=30", "lr=0.3", "early_stopping=2", "keep_best=true", 'monitor="loss"')
    ours = train(tmp_path / "one", *more)
    theirs = train(tmp_path / "two", *more, "accumulate=2", start=forked)
    epochs = [
        [line for line in figures(tmp_path / name) if "val_loss" in line] for name in ("one", "two")
    ]
    assert len(epochs[0]) == len(epochs[1]) < 30
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], atol=SUM_ORDER_AT_A_HIGH_RATE), name
