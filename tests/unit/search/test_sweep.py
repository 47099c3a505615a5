"""Runs made in parallel are the runs made alone, and a sweep chooses without the test set."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import restuning
from restuning import FitSettings, Host, RestuningError, load, methods
from restuning._errors import TrainingError
from restuning.data import load_data
from restuning.features import Cached, StoreOptions
from restuning.search.sweep import TRIED, SweepRun, parse_grid, sweep
from restuning.training import evaluate, fit
from restuning.training.parallel_runs import stack_signature, train_in_parallel
from restuning.training.run import open_inputs

ALONE_TOLERANCE = 1e-5
"""Stacked products round elsewhere than single ones."""
RUN = {"epochs": 2, "batch_size": 32}
CLASSES = 10


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    backbone = restuning.load_backbone("restuning-tiny")
    host = Host(backbone.model, *backbone.example)
    data = load_data("digits", backbone)
    for part in ("train", "val", "test"):
        setattr(data, part, torch.utils.data.Subset(getattr(data, part), range(100)))
    store = StoreOptions(tmp_path_factory.mktemp("stores"), views=2)
    inputs = open_inputs(host, backbone, data, store)
    return inputs, inputs.open_store(methods.build("res-tuning-bypass", host, CLASSES))


def made(host, seed=0, method="res-tuning-bypass", **options):
    torch.manual_seed(seed)
    return methods.build(method, host, CLASSES, **options)


@pytest.mark.parametrize(
    "method",
    [
        "res-tuning-bypass",
        *(pytest.param(m, marks=pytest.mark.slow) for m in ("bypass-horizontal", "linear")),
    ],
)
def test_a_parallel_run_ends_as_it_would_alone(world, tmp_path, method):
    inputs, kept = world
    host, data = inputs.host, inputs.data
    fed = kept.data(data, final=False)
    each = [
        FitSettings(lr=1e-3, weight_decay=1e-2, **RUN),
        FitSettings(lr=2e-3, weight_decay=0.0, clip=0.1, label_smoothing=0.1, **RUN),
        FitSettings(lr=1e-3, weight_decay=1e-2, lambda_rate=30.0, **RUN),
    ]
    parallel = train_in_parallel(
        host, [made(host, method=method) for _ in each], each, fed.train, fed.val
    )
    for number, (own, made_with_others) in enumerate(zip(each, parallel, strict=True)):
        task = made(host, method=method)
        tuned = Cached(host, task, kept.store)
        result = fit(
            tuned, fed.train, fed.val, settings=own, out=tmp_path / str(number), collate=fed.collate
        )
        for name, value in task.state_dict().items():
            torch.testing.assert_close(
                made_with_others.task.state_dict()[name],
                value,
                atol=ALONE_TOLERANCE,
                rtol=ALONE_TOLERANCE,
            )
        assert made_with_others.val_accuracy == pytest.approx(
            [e["val_accuracy"] for e in result.history]
        )
        assert made_with_others.train_loss == pytest.approx(result.train_loss, rel=ALONE_TOLERANCE)


def test_lambdas_go_further_at_a_rate_of_their_own(world):
    inputs, kept = world
    host, data = inputs.host, inputs.data
    fed = kept.data(data, final=False)
    each = [FitSettings(lr=1e-3, lambda_rate=rate, **RUN) for rate in (1.0, 30.0)]
    slow, fast = (
        a.task for a in train_in_parallel(host, [made(host) for _ in each], each, fed.train, None)
    )
    start = made(host)
    moved = [float((t.side.gate - start.side.gate).detach().abs().max()) for t in (slow, fast)]
    assert moved[1] > 10 * moved[0] > 0
    # Everything else keeps the common rate.
    heads = [float((t.head.weight - start.head.weight).detach().abs().max()) for t in (slow, fast)]
    assert heads[1] == pytest.approx(heads[0], rel=0.5)


def test_what_is_not_trained_alone_is_not_trained_in_parallel(world):
    """A fixed lambda, or the head of an ensemble, which passes answers on."""
    inputs, kept = world
    host, data = inputs.host, inputs.data
    fed = kept.data(data, final=False)
    each = [FitSettings(lr=rate, **RUN) for rate in (1e-2, 3e-2)]
    runs = train_in_parallel(host, [made(host, gate=0.3) for _ in each], each, fed.train, None)
    fixed = made(host, gate=0.3).side.gate
    for one in runs:
        assert torch.equal(one.task.side.gate, fixed)
        assert not torch.equal(one.task.head.weight, made(host).head.weight)
    assert stack_signature(made(host, gate=0.3)) != stack_signature(made(host))


def test_an_ensemble_is_weighed_in_parallel_as_alone(world, tmp_path):
    inputs, _ = world
    host, data = inputs.host, inputs.data
    kept = inputs.open_store(made(host, method="ensemble"))
    fed = kept.data(data, final=False)
    each = [FitSettings(lr=rate, **RUN) for rate in (1e-3, 3e-3)]
    runs = train_in_parallel(
        host, [made(host, method="ensemble") for _ in each], each, fed.train, fed.val
    )
    passed = made(host, method="ensemble").head.weight
    for one in runs:
        assert torch.equal(one.task.head.weight, passed)
        assert one.task.side.weight.tolist() != made(host, method="ensemble").side.weight.tolist()
        cached = Cached(host, one.task, kept.store)
        score = evaluate(cached, fed.val, 32, fed.collate)
        assert score["accuracy"] == pytest.approx(one.val_accuracy[-1])


@pytest.mark.parametrize("method", ["linear", "res-tuning-bypass"])
def test_settings_that_read_other_tokens_are_each_trained_as_alone(world, tmp_path, method):
    """One store has both, and neither is read or stacked for the other."""
    together = run(world, tmp_path / "both", {"pool": ["cls", "last"]}, seeds=(0,), method=method)
    for place, pool in enumerate(("cls", "last")):
        alone = run(world, tmp_path / pool, {"pool": [pool]}, seeds=(0,), method=method)
        (one,), both = alone["settings"], together["settings"][place]
        assert both["setting"]["pool"] == pool
        assert both["mean"] == pytest.approx(one["mean"])
    assert stack_signature(made(world[0].host, pool="cls")) != stack_signature(
        made(world[0].host, pool="last")
    )


def test_what_is_left_out_by_chance_is_part_of_what_is_stacked(world):
    host = world[0].host
    assert stack_signature(made(host, drop_path=0.1)) != stack_signature(made(host, drop_path=0.4))


def test_a_run_that_diverges_does_so_alone(world):
    inputs, kept = world
    host, data = inputs.host, inputs.data
    fed = kept.data(data, final=False)
    calm, wild = FitSettings(lr=1e-3, **RUN), FitSettings(lr=1e30, **RUN)
    alone = train_in_parallel(host, [made(host)], [calm], fed.train, fed.val)[0]
    both = train_in_parallel(host, [made(host), made(host)], [wild, calm], fed.train, fed.val)
    assert both[0].diverged_at is not None
    assert both[1].diverged_at is None
    for name, value in alone.task.state_dict().items():
        torch.testing.assert_close(
            both[1].task.state_dict()[name], value, atol=ALONE_TOLERANCE, rtol=ALONE_TOLERANCE
        )


def test_tasks_of_other_shapes_have_another_signature(world):
    host = world[0].host
    assert stack_signature(made(host)) == stack_signature(made(host, seed=1))
    assert stack_signature(made(host)) != stack_signature(made(host, rank=4))
    assert stack_signature(made(host)) != stack_signature(made(host, scale="channel"))


def test_runs_that_cannot_be_parallel_are_refused(world):
    inputs, kept = world
    host, data = inputs.host, inputs.data
    fed = kept.data(data, final=False)
    each = [FitSettings(epochs=1), FitSettings(epochs=2)]
    with pytest.raises(TrainingError, match="epochs"):
        train_in_parallel(host, [made(host), made(host)], each, fed.train, None)


def run(world, out, grid=None, seeds=(0, 1), **more):
    return sweep(
        world[0],
        more.pop("method", "res-tuning-bypass"),
        grid or {"lr": [1e-3, 5e-3], "rank": [2, 4]},
        seeds=seeds,
        settings=FitSettings(**RUN),
        out=out,
        **more,
    )


def test_a_sweep_chooses_on_validation_and_tests_the_choice_over_seeds(world, tmp_path):
    inputs, kept = world
    host, data = inputs.host, inputs.data
    report = run(world, tmp_path)
    means = [row["mean"] for row in report["settings"]]
    assert len(means) == 4
    assert report["best"]["mean"] == max(means)
    assert len(report["final"]["test_accuracy"]) == 2
    task = load(tmp_path / "final" / "seed-0.task", host)
    fed = kept.data(data, final=True)
    found = evaluate(Cached(host, task, kept.store), fed.test, collate=fed.collate)["accuracy"]
    assert found == pytest.approx(report["final"]["test_accuracy"][0])
    mean = Cached(host, load(tmp_path / "final" / "average.task", host), kept.store)
    found = evaluate(mean, fed.test, collate=fed.collate)["accuracy"]
    assert found == pytest.approx(report["average"]["test_accuracy"])
    assert json.loads((tmp_path / "sweep.json").read_text())["best"] == report["best"]


def test_final_tasks_of_a_sweep_have_the_temperature_of_their_setting_and_seed(world, tmp_path):
    report = run(world, tmp_path)
    setting = tuple(report["best"]["setting"].items())
    seen = set()
    for seed in (0, 1):
        name = SweepRun(setting, seed).name
        tried, final = (
            json.loads((tmp_path / kind / f"{name}.json").read_text()) for kind in (TRIED, "final")
        )
        task = load(tmp_path / "final" / f"seed-{seed}.task", world[0].host)
        assert task.temperature == tried["temperature"] == final["temperature"] != 1
        assert tried["calibrated_on"] == "validation"
        assert final["calibrated_on"] == "validation of the trial"
        seen.add(task.temperature)
    assert len(seen) == 2, "each seed its own"


def test_a_sweep_that_is_stopped_goes_on_and_ends_the_same(world, tmp_path):
    whole = run(world, tmp_path / "whole")
    told = []

    def stop(done, total, best):
        told.append(done)
        if done >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(world, tmp_path / "stopped", on_progress=stop)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "stopped/arms").glob("*.json")}
    assert 0 < len(before) < 8
    again = run(world, tmp_path / "stopped")
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "stopped/arms").glob("*.json")}
    assert {n: after[n] for n in before} == before
    assert again["settings"] == whole["settings"]
    assert again["final"] == whole["final"]


def test_another_sweep_in_the_same_folder_is_refused(world, tmp_path):
    run(world, tmp_path, grid={"lr": [1e-3]}, seeds=[0])
    with pytest.raises(TrainingError, match="another sweep"):
        run(world, tmp_path, grid={"lr": [2e-3]}, seeds=[0])


def test_tuners_inside_the_backbone_are_refused_in_words(world, tmp_path):
    with pytest.raises(TrainingError, match="inside the backbone"):
        run(world, tmp_path, grid={"lr": [1e-3]}, method="res-tuning")


def test_a_sweep_whose_arms_all_die_says_so(world, tmp_path):
    with pytest.raises(TrainingError, match="NaN"):
        run(world, tmp_path, grid={"lr": [1e30]})


def test_a_grid_reads_as_it_is_written():
    assert parse_grid("zero=true,False")["zero"] == [True, False]
    found = parse_grid("lr=1e-3,3e-3, rank=4,8 scale=none,channel")
    assert found == {"lr": [0.001, 0.003], "rank": [4, 8], "scale": ["none", "channel"]}


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="lr=,1e-3 rank.x", max_size=20))
def test_any_text_is_a_grid_or_is_refused_in_words(text):
    try:
        grid = parse_grid(text)
    except RestuningError as error:
        assert error.fix
    else:
        assert grid
        assert all(grid.values())
