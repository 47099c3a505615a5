"""`restuning plan`, and the forecast beside what a run measured."""

import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

import sounds
from restuning._errors import DataError, ForecastError
from restuning.cli import common
from restuning.cli.app import app

runner = CliRunner()


def plan(*args):
    done = runner.invoke(app, ["plan", *map(str, args), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_plan_names_memory_time_store_and_what_to_take():
    found = plan("--data", "digits", "--memory", "300MB", "--batch", 32)
    forms = {(o["method"], o["form"]) for o in found["options"]}
    assert forms == {
        ("linear", "cached"),
        ("linear", "live"),
        ("res-tuning-bypass", "cached"),
        ("res-tuning-bypass", "live"),
        ("res-tuning", "live"),
        ("res-tuning", "checkpointing"),
        ("full", "live"),
        ("full", "checkpointing"),
    }
    assert sum(found["splits"].values()) == 1797
    by_form = {(o["method"], o["form"]): o for o in found["options"]}
    cached = by_form["res-tuning-bypass", "cached"]
    # Seven taps of one token, 128 wide, in fp32.
    assert cached["store_bytes"] == 1797 * 7 * 128 * 4
    assert cached["reads"] == "7 taps, class token"
    assert cached["time_over_forward"] < by_form["res-tuning-bypass", "live"]["time_over_forward"]
    assert by_form["full", "live"]["time_over_forward"] > 2
    assert found["recommended"]["method"] == "res-tuning"
    assert found["recommended"]["batch"] == 32


@pytest.mark.slow
def test_a_small_budget_is_kept():
    found = plan("--images", 100, "--memory", "12MB")
    taken = found["recommended"]
    largest = {(o["method"], o["form"]): o["largest_batch"] for o in found["options"]}
    assert 1 <= taken["batch"] <= largest[taken["method"], taken["form"]]
    assert largest["full", "live"] == 0


def test_a_method_that_borrows_maps_is_planned_with_drawn_weights():
    found = plan("--method", "vpt-deep", "--batch", 2)
    assert [o["form"] for o in found["options"]] == ["live", "checkpointing"]


def test_the_table_is_for_people(monkeypatch):
    monkeypatch.setattr(common, "console", Console(width=200, markup=False))
    done = runner.invoke(app, ["plan", "--method", "linear", "--images", "50"])
    assert done.exit_code == 0
    for word in ("largest batch", "step / forward", "take", "class token", "store"):
        assert (word in done.stdout) == (word != "largest batch")


def test_sounds_are_planned_as_long_as_they_are_read(tmp_path):
    place = sounds.folder(tmp_path / "pitch", each=4)
    files = sorted(place.rglob("*.wav"))
    lines = [f"{file.relative_to(tmp_path)},{file.parent.name}" for file in files]
    (tmp_path / "calls.csv").write_text("\n".join(["where,kind", *lines]))
    heard = f"hf:{sounds.save('wav2vec2', tmp_path / 'model')}"
    asked = ("--backbone", heard, "--method", "linear", "--batch", 4)
    asked += ("--data", tmp_path / "calls.csv", "--audio", "where", "--label", "kind")
    long, short = plan(*asked), plan(*asked, "--seconds", 0.6)
    assert sum(long["splits"].values()) == len(files)
    assert long["splits"] == short["splits"]
    # Ten seconds, where nobody says anything.
    ratio = long["forward"]["above_bytes"] / short["forward"]["above_bytes"]
    assert ratio > 5
    done = runner.invoke(app, ["plan", "--seconds", "2"])
    assert isinstance(done.exception, DataError)


@pytest.mark.slow
def test_a_grid_is_timed_and_multiplied():
    more = ("--method", "res-tuning-bypass", "--images", 100, "--epochs", 2, "--finals", 0)
    one = plan(*more, "--arms", 2)["grid"]
    assert one["seconds"] == pytest.approx(one["features"] + one["search"])
    assert one["measured"]["arms"] == 2
    assert one["features"] == pytest.approx(100 * one["measured"]["forward_seconds"])


def test_a_budget_that_cannot_be_read_is_refused():
    done = runner.invoke(app, ["plan", "--memory", "lots"])
    assert isinstance(done.exception, ForecastError)
    done = runner.invoke(app, ["plan", "--method", "res-tuning", "--images", "9", "--arms", "2"])
    assert isinstance(done.exception, ForecastError)


@pytest.mark.parametrize(
    "method", [pytest.param("res-tuning", marks=pytest.mark.slow), "res-tuning-bypass"]
)
def test_metrics_hold_forecast_and_measurement(tmp_path, method):
    done = runner.invoke(
        app,
        [
            "train",
            "digits",
            "--method",
            method,
            "--epochs",
            "1",
            "--out",
            str(tmp_path / "run"),
            "--store",
            str(tmp_path / "stores"),
            "--json",
        ],
    )
    assert done.exit_code == 0, done.output
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    told = metrics["forecast"]
    assert "not_made" not in told
    assert told["peak_memory_bytes"] > told["saved_bytes"] > 0
    assert told["seconds"] > 0
    assert told["optimiser_bytes"] == 2 * 4 * metrics["trainable_parameters"]
    assert metrics["peak_memory_bytes"] > 0
    assert metrics["seconds"] > 0
