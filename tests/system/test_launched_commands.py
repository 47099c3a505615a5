"""The command line under a launcher: one process speaks and writes, and all make what one would make."""

import json

import numpy as np
import pytest
import torch
from launching import alone, forked, launched, start_both
from PIL import Image
from safetensors.torch import load_file

from children import Child
from commands import restuning
from restuning.features import Store, stores

SUM_ORDER = 1e-4
"""Gradients are summed in another order, and AdamW divides by what may be nothing: not bit-equal."""
HERE = "import os, runpy, sys; os.chdir(sys.argv.pop(1)); runpy.run_module('restuning', run_name='__main__')"
"""A program: `restuning` in a folder."""
EPOCHS = ("--epochs", 2, "--batch-size", 8)


@pytest.fixture(scope="module")
def shades(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("data") / "shades", np.random.default_rng(0)
    for number in range(50):
        name = "light" if number % 2 else "dark"
        (folder / name).mkdir(parents=True, exist_ok=True)
        low = 60 * (number % 2)
        pixels = rng.integers(low, low + 190, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name / f"{number:02}.png")
    return folder


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def assert_same_run(ours, theirs):
    assert files(ours) == files(theirs)
    one, two = (json.loads((run / "metrics.json").read_text()) for run in (ours, theirs))
    assert one["test_accuracy"] == two["test_accuracy"]
    assert one["val_accuracy"] == two["val_accuracy"]
    weights = [load_file(run / "shades.task/weights.safetensors") for run in (ours, theirs)]
    for name, weight in weights[0].items():
        one, two = (without_key_bias(name, w) for w in (weight, weights[1][name]))
        assert torch.allclose(one, two, atol=SUM_ORDER), name


def without_key_bias(name, weight):
    """A softmax does not change with the bias of keys: its gradient is rounding, which AdamW makes steps of."""
    if not name.endswith("qkv/bias"):
        return weight
    query, _, value = weight.chunk(3)
    return torch.cat([query, value])


@pytest.mark.parametrize(
    "method",
    [
        "linear",
        "ridge",
        *[pytest.param(m, marks=pytest.mark.slow) for m in ("res-tuning-bypass", "full")],
    ],
)
def test_a_run_of_two_processes_is_one_folder_and_the_run_of_one(shades, tmp_path, method):
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
    train = ["train", shades, "--method", method, *EPOCHS, "--store"]
    done = restuning(*train, tmp_path / "one stores", cwd=tmp_path / "one")
    assert done.returncode == 0, done.stderr
    (told, _), (other, complaints) = forked(
        ["-c", HERE, tmp_path / "two", *train, tmp_path / "two stores"]
    )
    # Its own name, the time, is agreed upon as well.
    (ours,), (theirs,) = ((tmp_path / place / "runs").iterdir() for place in ("one", "two"))
    assert_same_run(ours, theirs)
    assert told.count("left in") == 1
    assert told.count("result") == 1
    assert other == "" and "accuracy" not in complaints


@pytest.mark.slow
def test_three_methods_are_compared_once(shades, tmp_path):
    train = ["-m", "restuning", "train", shades, *EPOCHS, "--store"]
    alone([*train, tmp_path / "stores", "--out", tmp_path / "one"])
    (told, _), (other, _) = forked([*train, tmp_path / "stores", "--out", tmp_path / "two"])
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert told.count("result") == 1 and other == ""


def test_a_store_that_two_processes_build_is_the_store_of_one(shades, tmp_path):
    cache = ["cache", shades, "--batch-size", 4, "--store"]
    assert restuning(*cache, tmp_path / "one").returncode == 0
    (told, _), (other, _) = forked(["-m", "restuning", *cache, tmp_path / "two"])
    (one,), (two,) = (stores(tmp_path / place) for place in ("one", "two"))
    assert Store(one).manifest["shards"] == Store(two).manifest["shards"]
    assert files(one) == files(two)
    assert "shades" in told and other == ""


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["train", "SHADES", "--method", "auto"], "chosen in one process"),
        (["train", "SHADES", "--method", "linear", "--device", "cuda"], "device"),
        (["predict", "x.png", "--task", "no.task"], "runs in one process"),
    ],
)
def test_what_cannot_be_done_together_is_refused_by_all(shades, tmp_path, command, told):
    command = [shades if word == "SHADES" else word for word in command]
    both = start_both(["-m", "restuning", *command])
    for number, child in enumerate(both):
        out, errors = child.communicate(timeout=300)
        assert child.returncode == 1
        assert out == "" and told in errors and "Traceback" not in errors
        assert errors.startswith("process 1: ") == (number == 1)


@pytest.mark.slow
def test_what_stops_the_main_process_stops_the_other_in_words(shades, tmp_path):
    (tmp_path / "run").mkdir()
    # A folder where metrics should be: they cannot be written, after training.
    (tmp_path / "run/metrics.json").mkdir()
    train = ["train", shades, "--method", "linear", *EPOCHS, "--store", tmp_path / "stores"]
    both = start_both(["-m", "restuning", *train, "--out", tmp_path / "run"])
    first, second = (child.communicate(timeout=300)[1] for child in both)
    assert [child.returncode for child in both] == [1, 1]
    assert "metrics.json" in first and "Traceback" not in first + second
    assert "the main process of this run failed" in second


@pytest.mark.slow
def test_of_independent_processes_on_one_folder_one_works_and_the_others_say_so(shades, tmp_path):
    train = ["-m", "restuning", "train", shades, "--method", "full", "--epochs", 6, "--no-cache"]
    several = [Child([*train, "--out", tmp_path / "run"]) for _ in range(3)]
    said = [child.communicate(timeout=300) for child in several]
    assert sorted(child.returncode for child in several) == [0, 1, 1], said
    for child, (_, errors) in zip(several, said, strict=True):
        if child.returncode:
            assert "another process works in this folder" in errors
            assert "Traceback" not in errors
    assert ".lock" not in files(tmp_path / "run")
    alone([*train, "--out", tmp_path / "alone"])
    assert_same_run(tmp_path / "run", tmp_path / "alone")


@pytest.mark.slow
def test_accelerate_launch_trains_and_caches_as_one_process_does(shades, tmp_path):
    train = ["restuning", "train", shades, "--method", "mixing-bypass", *EPOCHS, "--store"]
    alone(["-m", *train, tmp_path / "one stores", "--out", tmp_path / "one"])
    told = launched(["-m", *train, tmp_path / "two stores", "--out", tmp_path / "two"])
    assert told.count("left in") == 1
    assert_same_run(tmp_path / "one", tmp_path / "two")
    cache = ["-m", "restuning", "cache", shades, "--tokens", "all", "--store"]
    alone([*cache, tmp_path / "one cache"])
    told = launched([*cache, tmp_path / "two cache"])
    (one,), (two,) = (stores(tmp_path / place) for place in ("one cache", "two cache"))
    assert Store(one).manifest["shards"] == Store(two).manifest["shards"]
