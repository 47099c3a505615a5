"""Folders of sweeps, choices and grids that older code left open today, or are refused in words.

They were written by the library as it was before its rooms (0.1.0 at commit 2644224): a choice and a
sweep of the same few digits as below, and a grid of `restuning bench run digits`.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import Subset

from commands import restuning
from restuning import FitSettings, Tuned, evaluate, load, load_backbone, load_data
from restuning._errors import TrainingError
from restuning.bench import read_results
from restuning.features import StoreOptions
from restuning.search import choose_method, trial
from restuning.search import sweep as sweeps
from restuning.search.candidates import SHRINK, Candidate
from restuning.training.run import open_inputs

RESULTS = Path(__file__).parent / "golden" / "results"
SETTINGS = FitSettings(epochs=1, batch_size=32)
ONE = (Candidate("linear", (5e-3,), 1, warm_start=True),)
RATES = {"lr": [1e-3, 1e-2]}
LARGEST = 60_000
"""Bytes of all of them: they are committed."""
ONE_IMAGE = 1 / 48 + 1e-6
"""Of the test split, whose answer may hang on how a machine rounds."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    backbone = load_backbone("restuning-tiny")
    digits = load_data("digits", backbone)
    few = replace(
        digits,
        train=Subset(digits.train, range(96)),
        val=Subset(digits.val, range(48)),
        test=Subset(digits.test, range(48)),
    )
    store = StoreOptions(tmp_path_factory.mktemp("stores"))
    return open_inputs(backbone.host(), backbone, few, store)


@pytest.fixture
def copy(tmp_path):
    return lambda name: shutil.copytree(RESULTS / name, tmp_path / name)


def never(*args, **more):
    raise AssertionError("a result that is there was made again")


def sweep_again(inputs, folder, **more):
    return sweeps.sweep(inputs, "linear", RATES, seeds=(0,), settings=SETTINGS, out=folder, **more)


def test_a_sweep_goes_on_with_what_its_folder_holds(inputs, copy, monkeypatch):
    folder = copy("sweep")
    before = json.loads((folder / "sweep.json").read_text())
    monkeypatch.setattr(sweeps, "train_in_parallel", never)
    after = json.loads(json.dumps(sweep_again(inputs, folder)))
    clock = {"seconds"}
    assert {k: v for k, v in after.items() if k not in clock} == {
        k: v for k, v in before.items() if k not in clock
    }


def test_a_run_that_an_older_sweep_lacks_is_made_and_is_what_it_would_have_been(inputs, copy):
    folder = copy("sweep")
    row = folder / "arms" / "lr=0.01.seed=0.json"
    before = json.loads(row.read_text())
    row.unlink()
    sweep_again(inputs, folder)
    after = json.loads(row.read_text())
    assert before.keys() <= after.keys()
    assert after["val_accuracy"] == pytest.approx(before["val_accuracy"], abs=ONE_IMAGE)


def test_the_task_of_an_older_sweep_answers_as_its_report_says(inputs, copy):
    folder = copy("sweep")
    task = load(folder / "final" / "seed-0.task", inputs.host)
    tested = evaluate(Tuned(inputs.host, task), inputs.data.test)["accuracy"]
    (written,) = json.loads((folder / "sweep.json").read_text())["final"]["test_accuracy"]
    assert tested == pytest.approx(written, abs=ONE_IMAGE)


def test_a_choice_is_taken_from_its_folder_with_the_weights_of_its_trial(inputs, copy, monkeypatch):
    folder = copy("choice")
    monkeypatch.setattr(trial.Trials, "_try", never)
    choice = choose_method(inputs, SETTINGS, folder, candidates=ONE)
    assert choice.to_dict() == json.loads((RESULTS / "choice.json").read_text())
    kept = load_file(RESULTS / "choice/fits/linear/lr=0.005/checkpoints/final.safetensors")
    assert choice.start is not None
    for name, value in choice.start.items():
        (theirs,) = [tensor for key, tensor in kept.items() if key.endswith(name)]
        assert torch.equal(value, theirs * SHRINK)


def test_what_a_choice_or_a_sweep_of_other_data_left_is_refused_with_the_difference(inputs, copy):
    other = replace(inputs.data, identity="another data set")
    elsewhere = replace(inputs, data=other, load_plain=lambda: other)
    for name, again in (
        ("choice", lambda out: choose_method(elsewhere, SETTINGS, out, candidates=ONE)),
        ("sweep", lambda out: sweep_again(elsewhere, out)),
    ):
        with pytest.raises(TrainingError, match="data: .* then, 'another data set' now") as told:
            again(copy(name))
        assert "another --out" in told.value.fix


def test_a_grid_has_nothing_left_to_make_and_is_reported(copy, tmp_path):
    folder = copy("grid")
    command = ["bench", "run", "digits", "--methods", "linear,bypass-vertical:rank=2"]
    command += ["--set", "linear:lr=1e-3,1e-2", "--seeds", 1, "--epochs", 1, "--batch-size", 64]
    done = restuning(*command, "--out", folder)
    assert done.returncode == 0, done.stderr
    assert "4 runs, 0 to make" in done.stdout
    report = restuning("bench", "report", folder, "--out", tmp_path / "report")
    assert report.returncode == 0, report.stderr
    page = (tmp_path / "report" / "report.md").read_text()
    finals = [result for result in read_results(folder) if result["stage"] == "final"]
    assert len(finals) == 2
    assert all(f"{100 * result['accuracy']:.1f}" in page for result in finals)
    other = restuning(*command, "--out", folder, "--weight-decay", 0.1)
    assert other.returncode == 1
    assert "weight_decay" in other.stderr
    assert "Traceback" not in other.stderr


def test_they_are_small():
    assert sum(p.stat().st_size for p in RESULTS.rglob("*") if p.is_file()) < LARGEST
