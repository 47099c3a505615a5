"""Runs end with the temperature that fits answers to what was not trained on, and say where it is from."""

import json

import pytest
import torch

import restuning
from restuning.search.train import train
from restuning.task import describe
from restuning.training import run as runs
from restuning.training.evaluate import collect_logits

HOW = {"epochs": 2, "batch_size": 32, "lr": 3e-2}


def probabilities(run, data):
    host = restuning.load_backbone("restuning-tiny").host()
    task = restuning.load(run.task_folder, host)
    logits, labels = collect_logits(restuning.Tuned(host, task), data, 64, None)
    return task.probabilities(logits), labels


def test_a_run_with_held_out_data_is_calibrated_on_them(few, tmp_path, stores):
    lines = []
    run = train(few, method="linear", out=tmp_path, store=stores, log=lines.append, **HOW)
    told = run.metrics
    assert told["calibrated_on"] == "validation"
    assert told["temperature"] == run.task.temperature != 1
    assert describe(run.task_folder)["task"]["temperature"] == told["temperature"]
    assert told["val_ece"] != told["val_ece_uncalibrated"]
    assert json.loads((tmp_path / "metrics.json").read_text()) == told
    assert any(line.startswith("  temperature") for line in lines)
    chances, labels = probabilities(run, few.val)
    error = restuning.training.calibration_error(chances.amax(1), chances.argmax(1) == labels)
    assert error == pytest.approx(told["val_ece"], abs=1e-6)


@pytest.mark.parametrize("how", [{"final": True}, {"no validation": True}])
def test_a_run_on_all_there_is_says_that_nothing_was_fitted(few, tmp_path, stores, how):
    data = few if "final" in how else few.with_splits(val=None)
    more = {"final": True} if "final" in how else {}
    lines = []
    run = train(data, method="linear", out=tmp_path, store=stores, log=lines.append, **more, **HOW)
    assert run.task.temperature == run.metrics["temperature"] == 1
    for name in ("calibrated_on", "val_ece", "val_ece_uncalibrated"):
        assert run.metrics[name] is None
    assert "temperature" not in describe(run.task_folder)["task"]
    assert not any("temperature" in line for line in lines)


def test_what_was_solved_from_rows_left_out_keeps_its_own_scale(few, tmp_path, stores):
    run = train(few, method="ridge", out=tmp_path, store=stores, epochs=1)
    assert run.task.temperature == 1
    assert run.metrics["calibrated_on"] == "rows left out of training"
    assert run.metrics["val_ece"] == run.metrics["val_ece_uncalibrated"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("method", ["linear", "res-tuning"])
def test_a_run_that_is_killed_before_its_calibration_goes_on_to_the_same_file(
    few, tmp_path, stores, monkeypatch, method
):
    how = {"method": method, "store": stores, **HOW}
    whole = train(few, out=tmp_path / "whole", **how)

    def kill(*args, **more):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(runs, "calibrate", kill)
        with pytest.raises(Killed):
            train(few, out=tmp_path / "killed", **how)
    assert not (tmp_path / "killed" / "metrics.json").exists()
    again = train(few, out=tmp_path / "killed", **how)
    for name in ("task.json", "weights.safetensors"):
        ours, theirs = (run.task_folder / name for run in (again, whole))
        assert ours.read_bytes() == theirs.read_bytes(), name
    # A third call finds it finished.
    third = train(few, out=tmp_path / "killed", **how)
    assert third.metrics["temperature"] == whole.metrics["temperature"] != 1


def test_a_method_that_was_chosen_has_the_temperature_of_its_trial(
    few, tmp_path, stores, monkeypatch
):
    from restuning.search import auto
    from restuning.search.candidates import CANDIDATES

    # By default they are an argument's value, so the function's own.
    monkeypatch.setitem(auto.choose_method.__kwdefaults__, "candidates", CANDIDATES[:1])
    torch.manual_seed(5)
    run = train(few, out=tmp_path, store=stores, epochs=1, batch_size=32)
    (row,) = run.choice.rows
    assert run.metrics["calibrated_on"] == "validation of the trial"
    assert run.metrics["temperature"] == row["temperature"] == run.task.temperature != 1
    assert run.metrics["val_ece"] == row["val_ece"]
    assert run.metrics["val_accuracy"] is None
    again = train(few, out=tmp_path, store=stores, epochs=1, batch_size=32)
    assert again.metrics["temperature"] == run.metrics["temperature"]
