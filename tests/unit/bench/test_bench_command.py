"""`restuning bench` at the command line: exit codes, words, JSON."""

import json
import shutil
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from restuning import RestuningError, load_backbone
from restuning._errors import UnknownNameError
from restuning.backbones import add_image_size
from restuning.bench import Event
from restuning.bench import bench as grids
from restuning.bench.runner import take_runs
from restuning.cli import bench
from restuning.cli.app import app

RUN = ["bench", "run", "--epochs", "1", "--seeds", "1", "--batch-size", "8"]


def call(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_a_grid_is_run_and_reported(suite, tmp_path):
    done = call(
        *RUN, suite, "--tasks", "shades", "--methods", "linear", "--out", tmp_path / "g", "--json"
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["runs"] == 1
    told = call("bench", "report", tmp_path / "g", "--published", "cifar100")
    assert told.exit_code == 0, told.output
    text = (tmp_path / "g/report/report.md").read_text()
    assert "shades (natural)" in text and "93.25" in text
    assert (tmp_path / "g" / "work" / ".gitignore").read_text() == "*\n"


def test_a_grid_with_a_failed_run_ends_with_exit_code_1(suite, tmp_path):
    done = call(
        *RUN, suite, "--tasks", "shades", "--methods", "res-tuning:layers=77", "--out", tmp_path
    )
    assert done.exit_code == 1 and "1 failed" in done.output


@pytest.mark.parametrize(
    ("written", "words"),
    [
        (("--methods", "res-tuning:rank=0"), "whole number from 1"),
        (("--methods", "lora", "--set", "rank=4,0"), "whole number from 1"),
        (("--methods", "linear,ssf", "--set", "rank=4,8"), "ssf takes none"),
        (("--methods", "linear:rank=4"), "changes nothing"),
        (("--methods", "res-tuning:breadth=4"), "no such option"),
        (("--methods", "auto:rank=4"), "memory and minutes"),
        (("--methods", "linear", "--set", "lr=0.1,-1"), "lr"),
    ],
)
def test_what_no_run_could_be_made_with_is_refused_before_a_folder_is(
    suite, tmp_path, written, words
):
    done = call(*RUN, suite, *written, "--out", tmp_path / "g")
    assert done.exit_code != 0
    assert isinstance(done.exception, RestuningError)
    assert words in str(done.exception)
    assert not (tmp_path / "g").exists()


@pytest.mark.parametrize("written", ["linear,loar", "half=res-tuning:layers=1-6,atuo"])
def test_a_misspelt_method_is_refused_before_any_run(suite, tmp_path, written):
    done = call(*RUN, suite, "--methods", written, "--out", tmp_path / "g")
    assert done.exit_code != 0
    assert isinstance(done.exception, UnknownNameError)
    assert "did you mean" in str(done.exception)
    assert "auto" in str(done.exception)
    assert not (tmp_path / "g").exists()


def test_a_whole_suite_passes_the_check_and_a_broken_one_does_not(suite, tmp_path):
    assert call("bench", "check", "shared", suite).exit_code == 0
    shutil.copytree(suite, tmp_path / "broken")
    (tmp_path / "broken/tones/images/test-0.png").unlink()
    done = call("bench", "check", "shared", tmp_path / "broken", "--json")
    assert done.exit_code == 1
    rows = json.loads(done.stdout[: done.stdout.rindex("]") + 1])
    assert [bool(r["problems"]) for r in rows] == [False, True]


def test_rivals_are_listed():
    rows = json.loads(call("bench", "methods", "--json").stdout)
    assert {"peft-lora", "ssf", "convpass", "side-tuning", "lst", "ms-swift", "auto"} <= {
        r["name"] for r in rows
    }
    assert all(r["source"] for r in rows)


@pytest.mark.parametrize(
    ("name", "size", "made"),
    [
        ("timm:vit", 112, "timm:vit@112"),
        ("timm:cnn:a=1", 64, "timm:cnn@64:a=1"),
        ("restuning-tiny", None, "restuning-tiny"),
    ],
)
def test_an_image_size_becomes_part_of_the_backbones_name(name, size, made):
    assert add_image_size(name, size) == made


@pytest.mark.parametrize("name", ["restuning-tiny", "timm:vit@224", "hf:x/y"])
def test_a_size_is_refused_where_none_is_taken(name):
    with pytest.raises(RestuningError, match="image size"):
        add_image_size(name, 112)


def test_an_event_is_one_line():
    assert bench.in_words(Event(0, "done", "a  b", 0.5, "test")) == " 50.00%  a  b (test)"
    assert "failed" in bench.in_words(Event(0, "failed", "a  b  because"))


@pytest.mark.parametrize(("methods", "times"), [("linear,ridge", 1), ("res-tuning", 0)])
def test_a_size_below_the_backbone_s_own_is_said_once_where_a_method_cannot_repair_it(
    suite, tmp_path, monkeypatch, methods, times
):
    small = replace(load_backbone("restuning-tiny"), own_size=(64, 64))
    monkeypatch.setattr(grids, "load_backbone", lambda *args, **more: small)
    words = (*RUN, suite, "--tasks", "shades,tones", "--methods", methods, "--out", tmp_path / "g")
    done = call(*words)
    assert done.exit_code == 0, done.output
    assert done.output.count("note  image size 32 px, the backbone's own is 64 px") == times
    # What is finished already is trained no more.
    assert "own is" not in call(*words).output


def test_one_process_of_several_says_it(grid, monkeypatch):
    small = replace(load_backbone("restuning-tiny"), own_size=(64, 64))
    monkeypatch.setattr(grids, "load_backbone", lambda *args, **more: small)
    told = []
    take_runs(grid(), 1, told.append)
    assert [event.kind for event in told] == ["start", "done"]
