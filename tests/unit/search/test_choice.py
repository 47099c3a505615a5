"""Choices made on a few real digits: what is taken, what is left out, and what a killed one ends with."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from torch.utils.data import Subset

from restuning import FitSettings, Host, export_engine, load_backbone, methods
from restuning._errors import DataError, FormatError, TrainingError
from restuning.data import load_data
from restuning.features import StoreOptions
from restuning.search import CANDIDATES, Budget, Candidate, choose_method, rule
from restuning.search.candidates import NOT_ASKED, SHRINK
from restuning.search.costs import Costs
from restuning.training import run as runs
from restuning.training.checkpoint import read
from restuning.training.defaults import with_own_lambda_rate
from restuning.training.run import open_inputs

LINEAR, BYPASS, RIDGE, _, INSIDE = CANDIDATES
MIXING = Candidate("mixing-bypass", (5e-3,), 4, warm_start=True)
LEFT_OUT = ("ridge", "ensemble")
"""They scale their answers on rows left out."""
CLOCK = ("seconds", "cpu_seconds")


def timeless(choice):
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in choice.rows]


def reasons(choice):
    return {row["method"]: row["why"] for row in choice.rows if row["status"] == "left out"}


def memory(whole, method):
    return next(r["memory_bytes"] for r in whole.rows if r["method"] == method)


def test_every_candidate_is_tried_and_one_is_taken_without_the_test_split(whole):
    assert [row["method"] for row in whole.rows] == [c.method for c in CANDIDATES]
    assert all(row["status"] in ("tried", "stopped") for row in whole.rows[:-1])
    top = rule.choose(whole.rows)
    assert (whole.method, whole.lr, whole.epochs) == (top["method"], top["lr"], top["epochs"])
    assert [row["method"] for row in whole.rows if row["why"] == "taken"] == [whole.method]
    assert whole.examples == 48
    assert json.loads(json.dumps(whole.to_dict()))["method"] == whole.method


def test_what_trains_through_the_backbone_is_tried_where_a_budget_of_time_asks_for_it(
    world, whole, tmp_path, known_costs
):
    assert reasons(whole) == {"res-tuning": NOT_ASKED}
    found = world.choose(tmp_path, budget=Budget(None, 1e4))
    assert reasons(found) == {}
    assert found.rows[-1]["method"] == "res-tuning"


def test_every_rate_is_tried_and_trials_that_are_not_gone_on_from_are_whole_runs(whole):
    for row, candidate in zip(whole.rows[:-1], CANDIDATES[:-1], strict=True):
        assert [t["lr"] for t in row["trials"]] == list(candidate.rates)
        assert row["val_accuracy"] == max(t["val_accuracy"] for t in row["trials"])
    for candidate in CANDIDATES:
        whole_run, final = candidate.trial_epochs(10), candidate.epochs(10)
        assert whole_run == 10 * candidate.times
        assert final < whole_run if candidate.warm_start else final == whole_run
        assert candidate.epochs(1) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("one", [MIXING, INSIDE])
def test_a_final_run_goes_on_from_the_weights_of_the_trial_that_was_taken(world, tmp_path, one):
    twice = replace(one, rates=(1e-3, 5e-3))
    found = world.choose(tmp_path, candidates=(twice,))
    task = methods.build(found.method, world.host, num_classes=world.data.num_classes)
    before = {name: value.clone() for name, value in task.state_dict().items()}
    found.begin(task)
    after = task.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    ended = read(tmp_path / f"fits/{one.method}/lr={found.lr:g}/checkpoints/final.safetensors")
    assert all(
        torch.equal(SHRINK * value, after[name]) for name, value in ended.part("task").items()
    )
    fits = list((tmp_path / "fits").glob("*/*"))
    assert [fit.name for fit in fits] == [f"lr={found.lr:g}"], "the others are removed"
    again = world.choose(tmp_path, candidates=(twice,))
    assert again.start.keys() == after.keys()
    assert all(torch.equal(again.start[name], after[name]) for name in after)
    assert again.to_dict()["goes_on"]


def test_a_row_tells_how_well_its_probabilities_fit(world, whole):
    classes = world.data.num_classes
    for row in whole.rows[:-1]:
        assert 0 < row["cross_entropy"] < 1.1 * math.log(classes)
        by_rate = {t["lr"]: t["cross_entropy"] for t in row["trials"]}
        assert row["cross_entropy"] == by_rate[row["lr"]]


def test_a_row_has_the_temperature_of_the_rate_that_it_is_scored_by(whole):
    for row in whole.rows[:-1]:
        (trial,) = (t for t in row["trials"] if t["lr"] == row["lr"])
        assert (row["temperature"], row["val_ece"]) == (trial["temperature"], trial["val_ece"])
        assert row["calibrated_on"] == (
            "rows left out of training" if row["method"] in LEFT_OUT else "validation"
        )
    scaled = [row["temperature"] for row in whole.rows[:-1] if row["method"] in LEFT_OUT]
    assert scaled == [1, 1]


def test_a_choice_hands_on_the_temperature_of_the_trial_that_was_taken(whole):
    for row in whole.rows[:-1]:
        told = replace(whole, method=row["method"]).calibration
        assert told.temperature == row["temperature"]
        assert told.on in ("validation of the trial", "rows left out of training")
    # Of a folder of before trials had one.
    old = [{k: v for k, v in row.items() if k not in told.to_dict()} for row in whole.rows]
    assert replace(whole, rows=old).calibration.on is None
    assert replace(whole, rows=old).calibration.temperature == 1


@pytest.mark.parametrize(
    ("memory", "again"), [pytest.param(None, False, marks=pytest.mark.slow), (2**34, True)]
)
def test_taps_are_computed_again_only_where_memory_is_limited(world, tmp_path, memory, again):
    found = world.choose(tmp_path, candidates=(MIXING,), budget=Budget(memory))
    task = methods.build("mixing-bypass", world.host, num_classes=world.data.num_classes)
    found.begin(task)
    assert task.side.recompute is again


def test_a_final_run_of_what_is_cheap_begins_anew(world, tmp_path):
    found = world.choose(tmp_path, candidates=(LINEAR,))
    task = methods.build("linear", world.host, num_classes=world.data.num_classes)
    before = {name: value.clone() for name, value in task.state_dict().items()}
    found.begin(task)
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())


@pytest.mark.slow
def test_weights_of_a_trial_that_are_gone_are_told_in_words(world, tmp_path):
    world.choose(tmp_path, candidates=(MIXING,))
    shutil.rmtree(tmp_path / "fits")
    with pytest.raises(FormatError, match=r"weights of a trial are gone[\s\S]*mixing-bypass\.json"):
        world.choose(tmp_path, candidates=(MIXING,))
    (tmp_path / "mixing-bypass.json").unlink()
    assert world.choose(tmp_path, candidates=(MIXING,)).start is not None


def test_the_same_seed_gives_the_same_choice(world, whole, tmp_path):
    again = world.choose(tmp_path, candidates=(LINEAR, BYPASS))
    for row, before in zip(again.rows, whole.rows, strict=False):
        assert row["trials"] == before["trials"]


def test_a_budget_of_memory_that_fits_nothing_tried_is_refused_with_what_is_needed(
    world, whole, tmp_path
):
    tight = Budget(memory(whole, "linear") + 2**20)
    with pytest.raises(TrainingError) as told:
        world.choose(tmp_path, candidates=(MIXING, INSIDE), budget=tight)
    assert "needs" in str(told.value)
    assert "MiB of memory, budget" in str(told.value)


def test_a_detached_method_stays_where_memory_leaves_out_those_inside(world, whole, tmp_path):
    forward = Costs(world.host, world.data, 0, FitSettings(epochs=1, batch_size=32)).forward()
    budget = Budget(max(forward.total_bytes, memory(whole, "linear")) + 2**20)
    found = world.choose(tmp_path, candidates=(LINEAR, MIXING), budget=budget)
    assert found.method == "linear"
    assert reasons(found)["mixing-bypass"].startswith("needs ")
    assert "MiB of memory, budget" in reasons(found)["mixing-bypass"]


def test_the_memory_of_every_candidate_is_known_beforehand(whole):
    assert all(row["memory_bytes"] > 0 for row in whole.rows[:-1])


@pytest.mark.slow
def test_a_batch_inside_the_backbone_that_does_not_fit_is_run_in_pieces(world, whole, tmp_path):
    free = world.choose(tmp_path / "free", candidates=(INSIDE,), budget=Budget(2**36))
    budget = Budget(int(0.7 * memory(free, "res-tuning")))
    found = world.choose(tmp_path, candidates=(INSIDE,), budget=budget)
    assert found.accumulate > 1
    assert memory(found, "res-tuning") <= budget.memory
    assert found.settings(FitSettings()).accumulate == found.accumulate


def test_a_budget_below_one_forward_is_refused_in_words(world, tmp_path):
    with pytest.raises(TrainingError, match="no method can be chosen") as told:
        world.choose(tmp_path, budget=Budget(10**6))
    assert all(c.method in str(told.value) for c in CANDIDATES)


@pytest.fixture
def known_costs(monkeypatch):
    """Times by method in place of measured ones."""
    times = {
        **dict.fromkeys(("linear", "res-tuning-bypass", "ridge", "ensemble"), (1.0, 2.0)),
        "mixing-bypass": (50.0, 100.0),
        "res-tuning": (1.0, 10.0),
    }
    monkeypatch.setattr(
        Costs, "run_seconds", lambda self, tuned, fed, settings, one, detached: times[one.method]
    )
    monkeypatch.setattr(Costs, "features_seconds", lambda self: 0.0)
    return times


def test_what_time_does_not_allow_is_left_out(world, tmp_path, known_costs):
    found = world.choose(tmp_path, candidates=(LINEAR, MIXING), budget=Budget(None, 100.0))
    assert "min, budget 1.7 min" in reasons(found)["mixing-bypass"]
    with pytest.raises(TrainingError, match="linear: needs"):
        world.choose(tmp_path / "short", candidates=(LINEAR,), budget=Budget(None, 0.5))


def test_a_trial_must_leave_time_for_the_final_run_of_the_best_before_it(
    world, tmp_path, known_costs
):
    known_costs["linear"], known_costs["res-tuning"] = (0.0, 90.0), (60.0, 1.0)
    found = world.choose(tmp_path, candidates=(LINEAR, INSIDE), budget=Budget(None, 120.0))
    assert found.method == "linear"
    assert "res-tuning" in reasons(found)


def test_measured_times_are_of_the_right_order(world, tmp_path):
    found = world.choose(tmp_path, candidates=(LINEAR,), budget=Budget(None, 3600.0))
    assert 0 < found.rows[0]["final_seconds"] < 600


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_choice_that_is_killed_between_candidates_goes_on_and_ends_the_same(
    world, tmp_path, after
):
    few = (LINEAR, BYPASS, Candidate("bypass-vertical", (5e-3, 1e-2), 2))
    said = []

    def kill(line):
        said.append(line)
        if len(said) == after:
            raise Killed

    with pytest.raises(Killed):
        world.choose(tmp_path / "killed", candidates=few, log=kill)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "killed").glob("*.json")}
    told = []
    again = world.choose(tmp_path / "killed", candidates=few, log=told.append)
    assert len(told) == len(few) - after
    assert (
        before.items()
        <= {p.name: p.stat().st_mtime_ns for p in (tmp_path / "killed").glob("*.json")}.items()
    )
    assert timeless(again) == timeless(world.choose(tmp_path / "whole", candidates=few))


@pytest.mark.slow
def test_a_trial_that_is_killed_is_not_refused_for_the_time_that_has_passed(
    world, tmp_path, known_costs, monkeypatch
):
    few, budget = (LINEAR, INSIDE), Budget(None, 100.0)
    real = runs.fit_until

    def kill(*args, **kwargs):
        raise Killed

    monkeypatch.setattr(runs, "fit_until", kill)
    with pytest.raises(Killed):
        world.choose(tmp_path, candidates=few, budget=budget)
    monkeypatch.setattr(runs, "fit_until", real)
    known_costs["res-tuning"] = (1e6, 1e6)
    found = world.choose(tmp_path, candidates=few, budget=budget)
    assert reasons(found) == {}
    assert found.rows[1]["final_seconds"] == 10.0


def test_a_folder_of_another_choice_is_refused_and_can_be_started_over(world, tmp_path):
    world.choose(tmp_path, candidates=(LINEAR,))
    with pytest.raises(TrainingError, match="begun otherwise"):
        world.choose(tmp_path, candidates=(LINEAR,), budget=Budget(2**33))
    again = world.choose(tmp_path, candidates=(LINEAR,), budget=Budget(2**33), resume=False)
    assert again.budget == Budget(2**33)


WORSE = {"method": "linear", "status": "tried", "val_accuracy": 7, "lr": 1, "seconds": 1}


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "[]",
        "{}",
        '{"method": "linear", "status": "tried"}',
        json.dumps(WORSE),
        json.dumps(WORSE | {"val_accuracy": "high"}),
        '{"method": "x", "status": "begun"}',
    ],
)
def test_a_damaged_row_is_refused_with_its_file(world, tmp_path, damage):
    world.choose(tmp_path, candidates=(LINEAR,))
    (tmp_path / "linear.json").write_text(damage)
    with pytest.raises(FormatError, match=r"linear\.json"):
        world.choose(tmp_path, candidates=(LINEAR,))


def test_arms_that_turn_nan_lose_and_if_all_do_the_method_is_left_out(world, tmp_path):
    wild = Candidate("linear", (1e30, 5e-3), 1)
    found = world.choose(tmp_path / "one", candidates=(wild,))
    assert found.lr == 5e-3
    inside = Candidate("res-tuning", (1e30,), 1)
    found = world.choose(
        tmp_path / "all", candidates=(LINEAR, inside), settings=FitSettings(epochs=4, batch_size=32)
    )
    assert found.method == "linear"


def test_a_trial_that_clearly_loses_is_ended_early(world, tmp_path, monkeypatch):
    monkeypatch.setattr(rule, "is_lost", lambda curve, epochs, best, count: len(curve) == 2)
    found = world.choose(tmp_path, candidates=(LINEAR, Candidate("bypass-vertical", (5e-3,), 8)))
    assert found.rows[1]["status"] == "stopped"
    assert len(found.rows[1]["trials"][0]["curve"]) == 2


def test_data_without_a_validation_split_are_refused(world, tmp_path):
    with pytest.raises(DataError, match="validation"):
        world.choose(tmp_path, data=replace(world.data, val=None))


def test_a_cnn_leaves_the_mixing_bypass_out_and_says_why(tmp_path):
    torch.manual_seed(0)
    backbone = load_backbone("timm:test_resnet@32", random=True)
    host = Host(backbone.model, *backbone.example)
    digits = load_data("digits", backbone)
    data = replace(
        digits, train=Subset(digits.train, range(32)), val=Subset(digits.val, range(16)), test=None
    )

    feed = open_inputs(host, backbone, data, StoreOptions(tmp_path / "stores"))
    found = choose_method(
        feed, FitSettings(epochs=1), tmp_path / "out", candidates=(LINEAR, MIXING)
    )
    assert found.method == "linear"
    assert "mixing" in reasons(found)["mixing-bypass"]


def test_texts_leave_out_what_reads_all_tokens(world, tmp_path):
    texts = replace(world.data, kind="text")
    found = world.choose(tmp_path, data=texts, candidates=(LINEAR, MIXING))
    assert reasons(found) == {"mixing-bypass": "all tokens of texts cannot be stored"}


@pytest.mark.slow
def test_an_engine_leaves_out_what_runs_inside_and_what_reads_tokens_it_does_not_give(
    world, tmp_path
):
    export_engine(world.backbone, tmp_path / "cls.pt2", runtime="pt2")
    engine = load_backbone(f"pt2:{tmp_path / 'cls.pt2'}")
    host, data = engine.host(), replace(world.data, test=None)

    feed = open_inputs(host, engine, data, StoreOptions(tmp_path / "stores"))
    found = choose_method(
        feed,
        FitSettings(epochs=1),
        tmp_path / "out",
        candidates=(LINEAR, MIXING, INSIDE),
        budget=Budget(2**34, 3600.0),
    )
    assert found.method == "linear"
    assert reasons(found) == {
        "mixing-bypass": "the engine gives other tokens than the task reads",
        "res-tuning": "nothing can be tuned inside an engine",
    }


def test_settings_of_the_final_run_follow_from_the_choice(whole):
    base = FitSettings(precision="bf16", seed=3, batch_size=16)
    settings = whole.settings(base)
    assert (settings.lr, settings.epochs, settings.seed) == (whole.lr, whole.epochs, 3)
    assert settings.precision == ("no" if whole.form == "stored" else "bf16")


def test_a_real_error_is_not_taken_for_a_reason(world, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise TrainingError("the log cannot be written")

    monkeypatch.setattr(runs, "fit_until", broken)
    with pytest.raises(TrainingError, match="log cannot be written"):
        world.choose(tmp_path, candidates=(MIXING,))


def test_a_bypass_is_tried_and_trained_at_its_own_rate_of_lambdas():
    assert with_own_lambda_rate(FitSettings(), "res-tuning-bypass").lambda_rate == 10
    assert with_own_lambda_rate(FitSettings(lambda_rate=3.0), "res-tuning-bypass").lambda_rate == 3
    assert with_own_lambda_rate(FitSettings(), "linear") == FitSettings()
    told = {each.method: each.to_dict().get("lambda_rate") for each in CANDIDATES}
    assert told["res-tuning-bypass"] == 10 and told["linear"] is None
