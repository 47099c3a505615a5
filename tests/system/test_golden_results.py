"""Folders of sweeps, choices and grids that older code left open today, or are refused in words.

They were written by the library as it was before its rooms (0.1.0 at commit 2644224): a choice and a
sweep of the same few digits as below, and a grid of `restuning bench run digits`.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from torch.utils.data import Subset

from commands import restuning
from restuning import FitSettings, Tuned, evaluate, load, load_backbone, load_data
from restuning._errors import TrainingError
from restuning.bench import read_results
from restuning.features import StoreOptions
from restuning.search import choose_method
from restuning.search import sweep as sweeps
from restuning.search.candidates import Candidate
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


def sweep_again(inputs, folder, **more):
    return sweeps.sweep(inputs, "linear", RATES, seeds=(0,), settings=SETTINGS, out=folder, **more)


def choose_again(inputs, folder):
    return choose_method(inputs, SETTINGS, folder, candidates=ONE)


@pytest.mark.parametrize(("name", "again"), [("sweep", sweep_again), ("choice", choose_again)])
def test_what_does_not_say_which_data_it_was_made_of_is_refused_and_kept(name, again, inputs, copy):
    """Data were known by paths and sizes then: whether these are the same cannot be told."""
    folder = copy(name)
    before = {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    with pytest.raises(TrainingError, match="does not say what it was made of") as told:
        again(inputs, folder)
    assert "the training data" in told.value.found
    assert "another --out" in told.value.fix
    assert {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()} == before


def test_the_task_of_an_older_sweep_answers_as_its_report_says(inputs, copy):
    folder = copy("sweep")
    task = load(folder / "final" / "seed-0.task", inputs.host)
    tested = evaluate(Tuned(inputs.host, task), inputs.data.test)["accuracy"]
    (written,) = json.loads((folder / "sweep.json").read_text())["final"]["test_accuracy"]
    assert tested == pytest.approx(written, abs=ONE_IMAGE)


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
