"""Runs: chosen on validation, tested once, the same from a store and live."""

import pytest
import torch

from restuning.bench import Bench, open_grid, read_result, result_file, run_grid
from restuning.bench.folder import unpack_hits
from restuning.training import evaluate

SAME_TOLERANCE = 1e-5
"""Losses of stored and live training: the same numbers, batched otherwise."""


@pytest.fixture
def done(grid):
    """Carries a grid out and reads its results by label and seed."""

    def make(*args, **kwargs):
        job = grid(*args, **kwargs)
        assert run_grid(job) == 0
        return job, [(run, read_result(result_file(job.folder, run))) for run in job.runs]

    return make


def test_the_setting_is_the_best_of_validation_and_the_final_run_trains_on_both(done):
    _, results = done(choices={"": {"lr": [1e-9, 1e-2]}})
    searched = {run.setting[0][1]: r for run, r in results if run.stage == "search"}
    (final,) = (r for run, r in results if run.stage == "final")
    best = max(searched, key=lambda lr: (searched[lr]["accuracy"], lr == 1e-9))
    assert final["setting"] == {"lr": best} == {"lr": final["settings"]["lr"]}
    assert {r["split"] for r in searched.values()} == {"validation"}
    assert {r["count"] for r in searched.values()} == {8} and final["count"] == 12
    assert {r["steps"] for r in searched.values()} == {3} and final["steps"] == 4
    assert final["chosen"]["validation_accuracy"] == searched[best]["accuracy"]


def test_a_result_holds_everything_a_report_tells(done):
    ((_, result),) = done(methods="res-tuning-bypass")[1]
    assert result["parameters"]["trained"] - result["parameters"]["without_head"] == 128 * 2 + 2
    assert 0 < result["memory"]["step_bytes"] < result["memory"]["live_step_bytes"]
    seconds = result["seconds"]
    assert all(seconds[k] > 0 for k in ("train", "step", "features", "inference", "whole"))
    assert result["file_bytes"] > 4 * result["parameters"]["trained"]
    assert result["group"] == "natural" and result["data"]["identity"]
    assert result["features"]["tokens"] == "cls"
    assert {"restuning", "torch", "python"} <= result["versions"].keys()


def test_right_answers_are_those_of_evaluate(grid):
    job = grid(methods="lora")
    bench = Bench(job.protocol, job.folder)
    seen = {}
    build = bench.build

    def kept(*args):
        seen["tuned"] = build(*args)
        return seen["tuned"]

    bench.build = kept
    result = bench.run(job.runs[0])
    test = bench.loaded.apart.test
    tested = evaluate(seen["tuned"], test, collate=bench.loaded.apart.collate)
    assert tested["accuracy"] == pytest.approx(result["accuracy"])
    assert unpack_hits(result["hits"], result["count"]).mean() == result["accuracy"]


@pytest.mark.slow
def test_detached_methods_end_alike_from_the_store_and_live(grid, tmp_path):
    from dataclasses import replace

    job = grid(methods="res-tuning-bypass", epochs=2)
    stored = Bench(job.protocol, job.folder).run(job.runs[0])
    live = Bench(replace(job.protocol, cache=False), tmp_path / "live").run(job.runs[0])
    assert stored["features"] and live["features"] is None
    assert stored["hits"] == live["hits"]
    assert stored["train_loss"] == pytest.approx(live["train_loss"], abs=SAME_TOLERANCE)


def test_held_images_are_what_the_data_set_gives(grid):
    from restuning.data import load_data

    job = grid()
    bench = Bench(job.protocol, job.folder)
    loaded = bench.data(job.runs[0].task)
    plain = load_data(job.runs[0].task.source, bench.backbone)
    for split in ("train", "val", "test"):
        ours, theirs = getattr(loaded.apart, split), getattr(plain, split)
        images, labels = ours.gather(range(len(theirs)), [])
        torch.testing.assert_close(images, torch.stack([x for x, _ in theirs]), atol=0, rtol=0)
        assert labels.tolist() == [y for _, y in theirs]


def test_seeds_differ_and_one_seed_repeats(done, grid, tmp_path):
    _, results = done(methods="res-tuning", seeds=2)
    first, second = (r["train_loss"] for _, r in results)
    assert first != second
    job = grid(methods="res-tuning", folder=tmp_path / "again")
    assert Bench(job.protocol, job.folder).run(job.runs[0])["train_loss"] == first


def test_runs_that_have_results_are_not_made_again_and_failures_only_when_asked(grid):
    job = grid(methods="linear,res-tuning:layers=99")
    run_grid(job)
    files = [result_file(job.folder, run) for run in job.runs]
    before = [file.stat().st_mtime_ns for file in files]
    assert open_grid(job.folder, job.protocol, job.runs) == []
    assert run_grid(job) == 1
    assert [file.stat().st_mtime_ns for file in files] == before
    assert open_grid(job.folder, job.protocol, job.runs, retry=True) == [job.runs[1]]


def test_columns_read_of_one_store_what_each_needs(done):
    job, results = done(methods="linear,ridge,mixing-bypass")
    read = {run.entry.label: result["features"] for run, result in results}
    assert len({each["digest"] for each in read.values()}) == 1
    assert {label: each["tokens"] for label, each in read.items()} == {
        "linear": "cls",
        "ridge": "cls",
        "mixing-bypass": "all",
    }
    assert read["linear"]["taps"] == 1
    assert all(result["seconds"]["features"] > 0 for _, result in results)


@pytest.mark.slow
def test_every_rival_is_trained_tested_and_counted_alike(done):
    names = "ssf,convpass,side-tuning,lst,res-tuning-after-norm,houlsby,bitfit,full,vpt-shallow"
    _, results = done(methods=names)
    assert [run.entry.label for run, _ in results] == names.split(",")
    for run, result in results:
        assert result["memory"].get("step_bytes", 0) > 0, (run.entry.label, result["memory"])
        assert result["parameters"]["without_head"] > 0 and result["file_bytes"] > 0
        assert result["seconds"]["inference"] > 0 and result["steps"] == 4
    kinds = {run.entry.label: result["features"] for run, result in results}
    assert kinds["lst"]["tokens"] == "all"
    assert all(kind is None for label, kind in kinds.items() if label != "lst")


def test_trackers_are_told_of_every_training_and_change_no_result(grid, monkeypatch):
    pytest.importorskip("tensorboard")
    told = []
    monkeypatch.setattr(
        "accelerate.tracking.TensorBoardTracker.store_init_configuration",
        lambda tracker, values: told.append(values),
    )
    job = grid()
    plain = Bench(job.protocol, job.folder / "plain").run(job.runs[0])
    tracked = Bench(job.protocol, job.folder, track=("tensorboard",)).run(job.runs[0])
    assert [(each["task"], each["method"]) for each in told] == [("shades", "linear")]
    assert told[0]["run"] == job.runs[0].name
    assert (plain["train_loss"], plain["settings"]) == (tracked["train_loss"], tracked["settings"])
