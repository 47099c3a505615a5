"""What a search left is read again only as what it wrote, for the search that wrote it."""

import json
import os

import pytest
import torch

from restuning._errors import FormatError, TrainingError
from restuning._files import SEAL, seal
from restuning.search.choice_folder import ChoiceFolder
from restuning.search.folder import OF, SearchFolder
from restuning.search.sweep import TRIED, SweepRun, read_result
from restuning.training import checkpoint

RUN, OTHER = SweepRun((("lr", 1e-3),), 0), SweepRun((("lr", 1e-2),), 0)
RESULT = {
    "setting": {"lr": 1e-3},
    "seed": 0,
    "val_accuracy": 0.75,
    "test_accuracy": None,
    "died_at": None,
    "trainable_parameters": 100,
}


def search(folder, data="a", **more):
    return SearchFolder(folder, {"data": data}, file="grid.json", what="another sweep", **more)


def edit(file, **values):
    """Change a result as somebody does who knows how it is sealed."""
    file.write_text(json.dumps(seal({**json.loads(file.read_text()), **values})))


def test_a_result_is_read_as_it_was_written(tmp_path):
    search(tmp_path).write(RESULT, TRIED, RUN.name)
    assert read_result(search(tmp_path), TRIED, RUN) == RESULT


@pytest.mark.parametrize(("old", "new"), [("0.75", "0.95"), ("100", "900"), ('"seed"', '"reed"')])
def test_a_result_that_was_edited_is_refused(tmp_path, old, new):
    search(tmp_path).write(RESULT, TRIED, RUN.name)
    file = search(tmp_path).path(TRIED, RUN.name)
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(FormatError, match="do not match their sha256"):
        read_result(search(tmp_path), TRIED, RUN)


@pytest.mark.parametrize(
    "values",
    [
        {"val_accuracy": 1.5},
        {"val_accuracy": "0.75"},
        {"val_accuracy": None},
        {"died_at": 3},
        {"died_at": "never"},
        {"trainable_parameters": -1},
        {"trainable_parameters": True},
        {"test_accuracy": []},
        {"seed": 1},
        {"setting": {"lr": 1e-2}},
        {"setting": {}},
        {"temperature": 0},
        {"val_ece_uncalibrated": 2},
    ],
)
def test_a_result_of_values_that_no_run_has_is_refused(tmp_path, values):
    search(tmp_path).write({**RESULT, **values}, TRIED, RUN.name)
    with pytest.raises(FormatError, match="incomplete or malformed"):
        read_result(search(tmp_path), TRIED, RUN)


def test_the_result_of_another_run_or_of_another_search_is_refused(tmp_path):
    for name in ("a", "b"):
        search(tmp_path / name, name).write(RESULT, TRIED, RUN.name)
        search(tmp_path / name, name).write({**RESULT, "setting": {"lr": 1e-2}}, TRIED, OTHER.name)
    mine, theirs = (search(tmp_path / n, n).path(TRIED, RUN.name) for n in ("a", "b"))
    mine.write_bytes(theirs.read_bytes())
    with pytest.raises(FormatError, match="another search"):
        read_result(search(tmp_path / "a"), TRIED, RUN)
    mine.write_bytes(search(tmp_path / "a").path(TRIED, OTHER.name).read_bytes())
    with pytest.raises(FormatError, match="another run"):
        read_result(search(tmp_path / "a"), TRIED, RUN)


def test_results_of_another_description_are_not_taken_over_where_the_description_is_gone(tmp_path):
    search(tmp_path).write(RESULT, TRIED, RUN.name)
    (tmp_path / "grid.json").unlink()
    assert read_result(search(tmp_path), TRIED, RUN) == RESULT
    (tmp_path / "grid.json").unlink()
    with pytest.raises(FormatError, match="another search"):
        read_result(search(tmp_path, "b"), TRIED, RUN)


def test_results_of_before_they_were_sealed_are_read(tmp_path):
    search(tmp_path).write(RESULT, TRIED, RUN.name)
    for file in (tmp_path / "grid.json", search(tmp_path).path(TRIED, RUN.name)):
        content = json.loads(file.read_text())
        del content[SEAL]
        content.pop(OF, None)
        file.write_text(json.dumps(content))
    assert read_result(search(tmp_path), TRIED, RUN) == RESULT


def test_starting_over_forgets_a_search_and_no_folder_that_is_none(tmp_path):
    search(tmp_path / "a").write(RESULT, TRIED, RUN.name)
    again = search(tmp_path / "a", "b", resume=False)
    assert not again.has(TRIED, RUN.name)
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("years of work")
    with pytest.raises(TrainingError, match="not left by a search"):
        search(tmp_path, resume=False)
    assert thesis.read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    search(tmp_path / "empty", resume=False)
    if os.name == "posix":
        (tmp_path / "link").symlink_to(tmp_path / "a")
        with pytest.raises(TrainingError, match="is a link"):
            search(tmp_path / "link", resume=False)
        assert (tmp_path / "a" / "grid.json").exists()


ROW = {
    "method": "linear",
    "status": "tried",
    "why": "",
    "seconds": 1.0,
    "epochs": 4,
    "accumulate": 1,
    "form": "stored",
    "goes_on": True,
    "lr": 1e-3,
    "val_accuracy": 0.5,
    "cross_entropy": 1.0,
}


def keep_weights(choice, value):
    folder = choice.run_folder("linear", 1e-3) / "checkpoints"
    tensors = {"task.weight": torch.full((3,), value)}
    checkpoint.write(folder, checkpoint.Snapshot(tensors, {"step": 1}), final=True)


def test_a_choice_takes_the_weights_that_its_trial_ended_with_and_no_others(tmp_path):
    choice = ChoiceFolder(tmp_path, {})
    keep_weights(choice, 1.0)
    choice.write(ROW)
    assert choice.read("linear") == ROW
    assert choice.weights("linear", 1e-3)["weight"].tolist() == [1.0] * 3
    keep_weights(choice, 2.0)
    with pytest.raises(FormatError, match="not those it ended with"):
        choice.weights("linear", 1e-3)


@pytest.mark.parametrize(
    "values",
    [{"epochs": 0}, {"epochs": None}, {"form": 1}, {"accumulate": "1"}, {"status": "begun"}]
    + [{"status": "left out", "why": None}, {"val_accuracy": 2}]
    + [{"temperature": 0}, {"temperature": "2"}, {"val_ece": 2}, {"calibrated_on": 1}],
)
def test_a_row_of_a_choice_that_is_none_is_refused(tmp_path, values):
    choice = ChoiceFolder(tmp_path, {})
    choice.write(ROW)
    edit(tmp_path / "linear.json", **values)
    with pytest.raises(FormatError, match="malformed"):
        choice.read("linear")


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
def test_pipes_in_the_place_of_results_and_checkpoints_are_not_waited_for(tmp_path):
    choice = ChoiceFolder(tmp_path, {})
    keep_weights(choice, 1.0)
    choice.write(ROW)
    final = choice.run_folder("linear", 1e-3) / "checkpoints" / checkpoint.FINAL
    final.unlink()
    os.mkfifo(final)
    with pytest.raises(FormatError, match="a named pipe"):
        checkpoint.read(final)
    (tmp_path / "linear.json").unlink()
    os.mkfifo(tmp_path / "linear.json")
    with pytest.raises(FormatError, match="a named pipe"):
        choice.read("linear")
