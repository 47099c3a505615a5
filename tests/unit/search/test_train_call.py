"""`restuning.train`: one call does what the command line does, and leaves the same behind."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import restuning
from restuning import FitSettings, RestuningError
from restuning._errors import BackboneError, DataError, TrainingError, UnknownNameError
from restuning.cli.app import app
from restuning.features import StoreOptions, build_store
from restuning.search.sweep import SweepRequest, run_sweep
from restuning.search.train import train
from restuning.training import fit_until
from restuning.training import run as runs
from restuning.training.fit import refuse_in_several
from restuning.training.run import Source

CLOCK = {"seconds", "peak_memory_bytes", "forecast", "features", "memory_measure"}
"""Figures that no two runs share; where features lie differs as well."""


def same(one, other):
    return {k: v for k, v in one.items() if k not in CLOCK} == {
        k: v for k, v in other.items() if k not in CLOCK
    }


def equal(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def shell(*arguments):
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 0, (done.output, done.exception)


@pytest.mark.parametrize("method", ["linear", pytest.param("ridge", marks=pytest.mark.slow)])
def test_the_call_and_the_command_line_leave_the_same(tmp_path, stores, method):
    options = {"epochs": 2, "batch_size": 32, "seed": 3}
    ours = train("digits", method=method, out=tmp_path / "call", store=stores, **options)
    flags = [f for n, v in options.items() for f in (f"--{n.replace('_', '-')}", v)]
    folder = tmp_path / "shell"
    shell("train", "digits", "--method", method, "--out", folder, "--store", stores, *flags)
    assert same(ours.metrics, json.loads((folder / "metrics.json").read_text()))
    settings = [(place / "settings.json").read_text() for place in (ours.folder, folder)]
    assert settings[0] == settings[1]
    left = [sorted(p.name for p in place.iterdir()) for place in (ours.folder, folder)]
    assert left[0] == left[1]
    backbone = restuning.load_backbone("restuning-tiny")
    theirs = restuning.load(folder / "digits.task", backbone.host())
    assert equal(ours.task, theirs)


def test_a_run_knows_its_task_its_folder_and_its_figures(few, tmp_path, stores):
    run = train(few, method="linear", out=tmp_path, store=stores, epochs=2)
    assert run.folder == tmp_path
    assert json.loads((tmp_path / "metrics.json").read_text()) == run.metrics
    assert run.test_accuracy == run.metrics["test_accuracy"]
    assert run.task.labels == few.labels
    assert (run.task_folder / "task.json").exists()
    assert not run.task.training


def test_memory_changes_nothing_where_features_fit_and_is_kept_where_they_do_not(
    few, tmp_path, stores
):
    how = {"method": "linear", "store": stores, "epochs": 1, "batch_size": 8}
    plain = train(few, out=tmp_path / "plain", **how)
    fits = train(few, out=tmp_path / "fits", memory="1GiB", **how)
    assert equal(plain.task, fits.task)
    assert "rows_at_once" not in fits.metrics["features"]
    lines: list[str] = []
    row = 4 * 128
    portioned = train(few, out=tmp_path / "portions", memory=24 * row, log=lines.append, **how)
    assert portioned.metrics["features"]["rows_at_once"] == 24
    assert [
        line for line in lines if "larger than memory" in line and "portions of 24 rows" in line
    ]
    assert not equal(plain.task, portioned.task), "in another order"
    live = {**how, "store": False, "device": "abacus"}
    with pytest.raises(TrainingError, match="no such device"):
        train(few, memory="1GiB", log=lines.append, **live)
    assert "unused by linear, which stores no features: --memory" in lines[-1]


def test_methods_are_compared_in_one_folder_and_the_best_is_best_on_validation(
    few, tmp_path, stores
):
    both = train(few, method=["linear", "ridge"], out=tmp_path, store=stores, epochs=1)
    assert [run.method for run in both.runs] == ["linear", "ridge"]
    assert [run.folder for run in both.runs] == [tmp_path / "linear", tmp_path / "ridge"]
    assert json.loads((tmp_path / "comparison.json").read_text()) == both.rows()
    assert (tmp_path / "comparison.png").stat().st_size > 0
    top = max(run.metrics["val_accuracy"] for run in both.runs)
    assert both.best.metrics["val_accuracy"] == top
    final = train(few, method=["linear"], out=tmp_path / "final", store=False, final=True, epochs=1)
    with pytest.raises(TrainingError, match="validation"):
        _ = final.best


def test_what_one_of_several_methods_refuses_is_told_before_any_is_trained(
    few, tmp_path, stores, monkeypatch
):
    monkeypatch.setitem(refuse_in_several.__globals__, "count_processes", lambda: 2)
    methods = ["linear", "ensemble"]
    with pytest.raises(TrainingError, match="deals the rows of a batch"):
        train(few, method=methods, out=tmp_path / "run", store=stores, epochs=1)
    assert not (tmp_path / "run" / "linear").exists()


@pytest.mark.slow
def test_auto_is_the_default_and_tells_how_it_chose(few, tmp_path, stores):
    lines = []
    run = train(
        few, out=tmp_path, store=stores, epochs=1, batch_size=32, memory="24MiB", log=lines.append
    )
    assert run.choice.method == run.method == run.metrics["choice"]["method"]
    assert json.loads((tmp_path / "choice.json").read_text()) == run.choice.to_dict()
    assert (run.task_folder / "choice.json").exists()
    assert run.metrics["val_accuracy"] is None, "the final run trains on both splits"
    assert any(line.startswith("take  ") for line in lines)


def test_nothing_is_printed(few, tmp_path, stores, capfd):
    train(few, method="linear", out=tmp_path, store=stores, epochs=1)
    told = capfd.readouterr()
    assert told.out == ""
    assert told.err == ""


class Killed(BaseException):
    pass


@pytest.mark.parametrize("method", ["linear", "res-tuning"])
def test_a_run_that_is_killed_and_called_again_ends_the_same(
    few, tmp_path, stores, monkeypatch, method
):
    how = {"method": method, "store": stores, "epochs": 2, "batch_size": 32, "checkpoint_every": 1}
    whole = train(few, out=tmp_path / "whole", **how)
    real = runs.fit

    def kill(*args, resume, progress, callbacks, about, **more):
        def stop(history):
            raise Killed

        return fit_until(stop, *args, resume=resume, **more)

    monkeypatch.setattr(runs, "fit", kill)
    with pytest.raises(Killed):
        train(few, out=tmp_path / "killed", **how)
    assert list((tmp_path / "killed" / "checkpoints").iterdir())
    assert not (tmp_path / "killed" / "metrics.json").exists()
    monkeypatch.setattr(runs, "fit", real)
    again = train(few, out=tmp_path / "killed", **how)
    assert same(again.metrics, whole.metrics)
    assert equal(again.task, whole.task)


def test_features_are_stored_only_where_that_is_asked_for(few, tmp_path, stores):
    live = train(few, method="linear", out=tmp_path / "live", store=False, epochs=2)
    assert live.metrics["features"] is None
    options = StoreOptions(stores, dtype="fp16")
    kept = train(few, method="linear", out=tmp_path / "kept", store=options, epochs=2)
    assert kept.metrics["features"]["dtype"] == "fp16"
    assert Path(kept.metrics["features"]["store"]).parent == stores


def test_settings_are_a_whole_object_single_words_or_both(few, tmp_path):
    base = FitSettings(epochs=1, lr=1e-2, batch_size=16)
    run = train(few, method="linear", out=tmp_path, store=False, settings=base, lr=2e-2)
    assert run.metrics["settings"] == replace(base, lr=2e-2).to_dict()


def test_options_of_a_method_reach_it(few, tmp_path):
    run = train(few, method="res-tuning", out=tmp_path, epochs=1, rank=2, drop_path=0.1)
    assert run.metrics["options"] == {"rank": 2, "drop_path": 0.1}
    assert run.metrics["settings"]["drop_path"] == 0.1


def test_a_backbone_that_is_loaded_is_taken_as_it_is(few, tmp_path):
    backbone = restuning.load_backbone("restuning-tiny")
    run = train(few, backbone=backbone, method="linear", out=tmp_path, store=False, epochs=1)
    assert run.metrics["fingerprint"] == backbone.host().fingerprint()


@pytest.mark.parametrize(
    "options", [{"weights": "other.safetensors"}, {"random": True}], ids=["weights", "random"]
)
def test_how_a_backbone_is_loaded_is_refused_where_it_is_loaded(few, tmp_path, options):
    backbone = restuning.load_backbone("restuning-tiny")
    with pytest.raises(BackboneError, match="taken as it is") as told:
        train(few, backbone=backbone, method="linear", out=tmp_path / "run", **options)
    assert told.value.where == next(iter(options))
    source = Source(few)
    with pytest.raises(BackboneError, match="taken as it is"):
        run_sweep(SweepRequest(source, "linear", {"lr": [1e-3]}, backbone=backbone, **options))
    with pytest.raises(BackboneError, match="taken as it is"):
        build_store("digits", backbone, **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "option", [{"skip_bad": True}, {"text": "review"}, {"label": "verdict"}, {"max_tokens": 9}]
)
def test_how_data_are_read_is_refused_where_they_are_loaded(few, tmp_path, option):
    with pytest.raises(DataError, match="taken as they are") as told:
        train(few, method="linear", out=tmp_path / "run", **option)
    assert told.value.where == next(iter(option))
    # The default says nothing.
    usual = {"skip_bad": False, "text": "text", "label": "label"}
    train(few, method="linear", out=tmp_path / "run", store=False, epochs=1, **usual)


def test_a_start_at_random_reaches_the_method(few, tmp_path):
    how = {"method": "bypass-vertical", "store": False, "epochs": 1, "lr": 1e-12}
    started = {
        zero: train(few, out=tmp_path / str(zero), zero=zero, **how) for zero in (True, False)
    }
    assert [run.metrics["options"]["zero"] for run in started.values()] == [True, False]
    assert not equal(started[True].task, started[False].task)


def test_the_cpu_can_be_named(few, tmp_path):
    run = train(few, method="linear", out=tmp_path, store=False, epochs=1, device="cpu")
    assert run.metrics["hardware"]["device"] == "cpu"


def test_data_without_a_validation_split_train_on_both_splits_where_that_is_asked(few, tmp_path):
    run = train(
        few, method="linear", out=tmp_path, store=False, epochs=1, batch_size=16, final=True
    )
    assert run.metrics["steps"] == (96 + 48) // 16
    assert run.metrics["val_accuracy"] is None


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"method": "lineer"}, UnknownNameError, "did you mean linear"),
        ({"method": ["linear", "none"]}, UnknownNameError, "no such method"),
        ({"method": []}, TrainingError, "nothing to train"),
        ({"epochz": 3}, TrainingError, "did you mean epochs"),
        ({"lr": 1e-3}, TrainingError, "chooses this itself"),
        ({"zero": False}, TrainingError, "chooses this itself"),
        ({"method": "linear", "zero": False}, UnknownNameError, "changes nothing"),
        ({"method": ["auto", "ridge"]}, TrainingError, "not compared with others"),
        ({"method": ["ridge", "linear", "ridge"]}, TrainingError, "compared with itself"),
        ({"method": "res-tuning", "rank": 0}, UnknownNameError, "cannot have this value"),
        ({"method": "linear", "class_names": "names.txt"}, TrainingError, "made of them"),
        ({"method": "linear", "minutes": 3}, TrainingError, "a budget is for"),
        ({"store": False}, TrainingError, "stored features first"),
        ({"method": "linear", "epochs": 0}, TrainingError, "out of its range"),
        ({"method": "linear", "device": "abacus"}, TrainingError, "no such device"),
        ({"method": "linear", "augment": "flip"}, DataError, "not augmented"),
    ],
)
def test_mistakes_are_told_in_words(few, tmp_path, options, kind, words):
    with pytest.raises(RestuningError, match=words) as told:
        train(few, out=tmp_path / "run", **options)
    assert isinstance(told.value, kind)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("word", ["off", "None", "", " FALSE"])
def test_a_word_that_means_a_switch_is_no_folder_of_a_store(tmp_path, monkeypatch, word):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TrainingError, match="store of features is a folder"):
        train("digits", method="linear", store=word, out=tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("method", "options"),
    [("linear", {"rank": 4}), ("ridge", {"scale": "gate"}), (["linear", "full"], {"layers": [1]})],
)
def test_an_option_that_no_named_method_has_a_use_for_is_refused(tmp_path, method, options):
    with pytest.raises(UnknownNameError, match="changes nothing"):
        train("digits", method=method, out=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_of_several_methods_an_option_is_for_those_that_have_a_use_for_it(tmp_path, recwarn):
    found = train("digits", method=["linear", "res-tuning-bypass"], rank=3, epochs=1, out=tmp_path)
    plain, tuned = found.runs
    assert not [w for w in recwarn if "no use" in str(w.message)]
    assert {t.rank for t in tuned.task.modules() if hasattr(t, "rank")} == {3}
    assert plain.task.tuner_parameters() == 0
