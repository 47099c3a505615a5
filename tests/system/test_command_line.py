"""The command line as a user meets it: what it leaves and prints, exit codes, no tracebacks."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from commands import as_process, restuning
from restuning import load_backbone, methods
from restuning.task import summarise

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    done = restuning("train", "digits", "--method", "linear", "--epochs", 2, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)


def test_train_leaves_what_it_promises(trained):
    out, row = trained
    for name in ("metrics.json", "curves.png", "log.jsonl", "settings.json", "digits.task"):
        assert (out / name).exists(), name
    metrics = json.loads((out / "metrics.json").read_text())
    keys = {
        "method",
        "test_accuracy",
        "trainable_parameters",
        "tuner_parameters",
        "peak_memory_bytes",
        "seconds",
        "seed",
    }
    assert keys <= metrics.keys()
    assert row["trainable_parameters"] == 1290


@pytest.mark.slow
def test_without_a_method_three_are_compared(tmp_path):
    done = restuning("train", "digits", "--epochs", 1, "--out", tmp_path / "all")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "all" / "comparison.json").read_text())
    assert [r["method"] for r in rows] == ["linear", "res-tuning", "res-tuning-bypass"]
    assert Image.open(tmp_path / "all" / "comparison.png").size[0] > 1000


def test_eval_gives_the_accuracy_that_training_reported(trained):
    out, row = trained
    done = restuning("eval", out / "digits.task", "digits", "--json")
    assert json.loads(done.stdout)["accuracy"] == row["test_accuracy"]


def test_eval_and_info_tell_the_temperature_that_training_fitted(trained):
    out, _ = trained
    metrics = json.loads((out / "metrics.json").read_text())
    told = json.loads(restuning("info", out / "digits.task", "--json").stdout)
    assert told["temperature"] == metrics["temperature"] != 1
    tested = json.loads(restuning("eval", out / "digits.task", "digits", "--json").stdout)
    assert tested["temperature"] == metrics["temperature"]
    assert tested["ece"] != tested["ece_uncalibrated"]
    assert tested["nll"] < tested["loss"]
    shown = restuning("eval", out / "digits.task", "digits").stdout
    assert "ece" in shown
    assert "temperature" in shown


def test_a_task_on_random_weights_is_tested_on_the_same_ones(tmp_path):
    out, task = tmp_path / "run", tmp_path / "run" / "digits.task"
    more = ("--method", "linear", "--epochs", 1, "--store", tmp_path / "store", "--out", out)
    done = restuning("train", "digits", "--random", *more, "--json")
    assert done.returncode == 0, done.stderr
    # A process that has drawn other numbers before it.
    torch.manual_seed(11)
    tested = restuning("eval", task, "digits", "--random", "--json")
    assert tested.returncode == 0, tested.stderr
    assert json.loads(tested.stdout)["accuracy"] == json.loads(done.stdout)["test_accuracy"]
    refused = restuning(
        "eval", task, "digits", "--random", "--weights", tmp_path / "none.safetensors"
    )
    assert refused.returncode == 1
    assert "none.safetensors" in refused.stderr


def test_predict_answers_in_json_lines_and_names_a_corrupt_image(trained, tmp_path):
    out, _ = trained
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    (tmp_path / "c.cr3").write_bytes(b"of a kind that we do not know")
    done = restuning(
        "predict", tmp_path / "a.png", "--task", out / "digits.task", "--top", 3, "--json"
    )
    assert len(json.loads(done.stdout)["predictions"]) == 3
    done = restuning("predict", tmp_path, "--task", out / "digits.task")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "b.png" in done.stderr
    done = restuning("predict", tmp_path, "--task", out / "digits.task", "--skip-bad")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "1 task, 1 backbone forward a batch"
    assert "left out: " in done.stderr
    for words in ("1 corrupt file (", "b.png)", "1 file that is no image (", "c.cr3)"):
        assert words in done.stderr
    for more in ((), ("--skip-bad",)):
        done = restuning("predict", tmp_path / "a.png", tmp_path / "d.png", "--task", out, *more)
        assert (done.returncode, done.stdout) == (1, "")
        assert "no such image or folder" in done.stderr
        assert "d.png" in done.stderr
        assert "check the path" in done.stderr


def test_a_process_of_its_own_ends_as_one_in_this_process_does(tmp_path):
    """All other tests of commands rest on it."""
    for arguments in (["train", "digits", "--lr", "-1"], ["methods", "--json"]):
        ours, process = (run(*arguments, cwd=tmp_path) for run in (restuning, as_process))
        assert (ours.returncode, ours.stdout) == (process.returncode, process.stdout)
        assert ours.stderr.splitlines()[-1:] == process.stderr.splitlines()[-1:]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "no/such/folder"], "no such data set"),
        (["train", "digits", "--method", "res-tunning"], "did you mean"),
        (["train", "digits", "--backbone", "nothing"], "no such backbone"),
        (["train", "digits", "--lr", "-1"], "out of its range"),
        (["info", "nothing"], "no such backbone"),
        (["eval", "nothing.task", "digits"], "no task here"),
    ],
)
def test_a_mistake_is_answered_in_words_without_a_traceback(arguments, words, tmp_path):
    done = restuning(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_sites_info_and_methods_print_json():
    rows = json.loads(restuning("sites", "restuning-tiny", "--json").stdout)
    assert len(rows) == 18
    assert all(row["projections"] for row in rows)
    told = json.loads(restuning("info", "restuning-tiny", "--json").stdout)
    assert told["layers"] == 6
    # A Python user is told the same.
    backbone = load_backbone("restuning-tiny")
    assert told == json.loads(json.dumps(backbone.summarise()))
    assert rows == backbone.host().sites.rows()
    assert "res-tuning" in restuning("methods", "--json").stdout


def test_methods_are_counted_on_a_backbone_or_have_no_place_there():
    done = restuning("methods", "--backbone", "restuning-tiny", "--classes", 7, "--json")
    rows = {row.pop("method"): row for row in json.loads(done.stdout)}
    counted = methods.count_parameters(load_backbone("restuning-tiny").host(), 7)
    assert counted["linear"] == {
        "tuner parameters": 0,
        "with head": 7 * (128 + 1),
        "not here": None,
    }
    for name, row in counted.items():
        assert row.items() <= rows[name].items()
        assert (row["not here"] is None) == isinstance(row["with head"], int)


@pytest.mark.parametrize("name", ["format1_inline", "format2_bypass", "format2_ridge"])
def test_info_of_a_task_folder_is_one_call_of_the_library(name):
    folder = GOLDEN / f"{name}.task"
    told = json.loads(restuning("info", folder, "--json").stdout)
    assert told == summarise(folder)
    assert told["bytes"] == (folder / "weights.safetensors").stat().st_size
    assert (told["side network"] is None) == bool(told["tuners"])


@pytest.mark.parametrize("task", ["{}", '{"method": "linear", "tuners": 3, "side": null}'])
def test_info_of_a_malformed_task_is_refused_in_words(task, tmp_path):
    description = json.loads((GOLDEN / "format2_bypass.task" / "task.json").read_text())
    (tmp_path / "task.json").write_text(json.dumps({**description, "task": json.loads(task)}))
    done = restuning("info", tmp_path)
    assert done.returncode == 1
    assert "malformed" in done.stderr
    assert "task.json" in done.stderr
    assert "Traceback" not in done.stderr
