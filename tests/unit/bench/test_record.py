"""Results are whole or refused in words."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from restuning import RestuningError
from restuning._files import write_json
from restuning.bench import read_result, read_results, result_file, run_grid
from restuning.bench.folder import pack_hits, unpack_hits


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
