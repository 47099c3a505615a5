"""Results are whole or refused in words."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from restuning import RestuningError
from restuning._errors import FormatError, RestuningWarning, TrainingError
from restuning._files import seal, write_json
from restuning.bench import open_grid, read_result, read_results, result_file, run_grid
from restuning.bench.folder import (
    describe_run,
    pack_hits,
    read_protocol,
    refuse_other_source,
    unpack_hits,
)


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_right_answers_come_back_as_they_were(hits):
    assert unpack_hits(pack_hits(hits), len(hits)).tolist() == hits


@given(st.text(max_size=30), st.integers(-3, 300))
def test_malformed_right_answers_are_refused_in_words(text, count):
    try:
        assert len(unpack_hits(text, count)) == count
    except RestuningError as error:
        assert "right answers" in str(error)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """A valid result, without training anything."""
    hits = np.array([True, False, True, True])
    return {
        "format": 1,
        "status": "done",
        "task": "t",
        "label": "l",
        "method": "m",
        "stage": "final",
        "seed": 0,
        "accuracy": 0.75,
        "count": 4,
        "hits": pack_hits(hits),
        "parameters": {},
        "memory": {},
        "seconds": {},
        "settings": {},
        "data": {},
        "versions": {},
        "hardware": {},
    }


def test_a_valid_result_is_read(result, tmp_path):
    write_json(tmp_path / "a" / "r.json", result)
    assert read_result(tmp_path / "a" / "r.json") == result
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["r.json"]


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"accuracy": 1.5},
        {"accuracy": "high"},
        {"accuracy": 0.5},
        {"hits": "!"},
        {"count": 40},
        {"status": None},
        {"seed": "zero"},
        {"parameters": []},
        {"seed": True},
    ],
)
def test_a_result_with_a_wrong_field_is_refused(result, tmp_path, change):
    write_json(tmp_path / "r.json", {**result, **change})
    with pytest.raises(RestuningError, match=r"r\.json"):
        read_result(tmp_path / "r.json")


@settings(max_examples=60)
@given(st.data())
def test_a_result_cut_short_is_refused(result, tmp_path_factory, data):
    text = json.dumps(result)
    file = tmp_path_factory.mktemp("cut") / "r.json"
    file.write_text(text[: data.draw(st.integers(0, len(text) - 1))])
    with pytest.raises(RestuningError, match=r"r\.json"):
        read_result(file)


def test_a_folder_without_a_grid_is_refused(tmp_path):
    with pytest.raises(RestuningError, match="no grid here"):
        read_results(tmp_path)


def test_a_run_that_fails_is_recorded_and_the_others_are_made(grid):
    job = grid(methods="linear,res-tuning:layers=99")
    assert run_grid(job) == 1
    linear, wrong = (read_result(result_file(job.folder, run)) for run in job.runs)
    assert linear["status"] == "done"
    assert wrong["status"] == "failed" and "layers 1 to" in wrong["error"]


def edit(file, **values):
    """Change a file as somebody does who knows how it is sealed."""
    file.write_text(json.dumps(seal({**json.loads(file.read_text()), **values})))


def test_a_grid_refuses_the_result_of_another_run_or_protocol(grid, tmp_path):

    one = grid("linear,bitfit", folder=tmp_path / "one")
    two = grid("linear,bitfit", folder=tmp_path / "two", lr=2e-2)
    for job in (one, two):
        for run in job.runs:
            failed = {"status": "failed", "error": "it diverged"}
            result = {**describe_run(run, job.protocol), **failed}
            write_json(result_file(job.folder, run), result, sealed=True)
    open_grid(one.folder, one.protocol, one.runs)
    assert len(read_results(one.folder)) == 2
    mine = result_file(one.folder, one.runs[0])
    for theirs in (result_file(one.folder, one.runs[1]), result_file(two.folder, two.runs[0])):
        before = mine.read_bytes()
        mine.write_bytes(theirs.read_bytes())
        with pytest.raises(FormatError, match="another run belongs"):
            open_grid(one.folder, one.protocol, one.runs)
        with pytest.raises(FormatError, match="another run belongs"):
            read_results(one.folder)
        mine.write_bytes(before)


@pytest.mark.parametrize(
    "change",
    [{"protocol": []}, {"choices": 1}, {"format": 2}, {"versions": "x"}],
)
def test_a_description_of_a_grid_of_another_shape_is_refused(grid, change):

    job = grid()
    edit(job.folder / "grid.json", **change)
    for read in (
        lambda: open_grid(job.folder, job.protocol, job.runs),
        lambda: read_protocol(job.folder),
    ):
        with pytest.raises(FormatError, match="malformed"):
            read()


@pytest.mark.parametrize(
    "change", [{"backbone": 1}, {"settings": {"lr": -1}}, {"settings": None}, {"more": 1}]
)
def test_a_protocol_of_values_that_are_none_is_refused(grid, change):

    job = grid()
    content = json.loads((job.folder / "grid.json").read_text())
    edit(job.folder / "grid.json", protocol={**content["protocol"], **change})
    with pytest.raises((FormatError, TrainingError)):
        read_protocol(job.folder)


@pytest.mark.parametrize("name", ["the backbone", "the data of digits"])
def test_results_of_other_data_or_of_another_backbone_do_not_stand_in_one_grid(tmp_path, name):
    refuse_other_source(tmp_path, name, "0123", "digits")
    refuse_other_source(tmp_path, name, "0123", "digits")
    refuse_other_source(tmp_path, "the data of pets", "89ab", "pets")
    with pytest.raises(TrainingError, match=f"{name}: '0123' then, '4567' now"):
        refuse_other_source(tmp_path, name, "4567", "digits")


def test_results_of_before_that_do_not_say_what_they_are_of_are_warned_of(tmp_path):
    file = tmp_path / "runs" / "digits" / "linear" / "final.seed=0.json"
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    with pytest.warns(RestuningWarning, match="do not say what they were made of"):
        refuse_other_source(tmp_path, "the data of digits", "0123", "digits")
