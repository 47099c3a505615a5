"""Plans of grids: entries, choices, tasks, and what a folder refuses."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from restuning import RestuningError
from restuning._files import read_json, write_json
from restuning.bench import (
    Entry,
    GridProtocol,
    SuiteTask,
    find_tasks,
    list_runs,
    open_grid,
    parse_choices,
    parse_entries,
)
from restuning.bench.folder import read_grid
from restuning.bench.grid import slug
from restuning.training import FitSettings

TASK = SuiteTask("shades", "natural", "somewhere")


def test_methods_are_read_with_options_labels_and_combinations():
    read = parse_entries(
        "linear, res-tuning[mha=prompt,ffn=adapter], few=res-tuning:rank=2:layers=1-3"
    )
    assert read == [
        Entry("linear", "linear"),
        Entry("res-tuning[mha=prompt,ffn=adapter]", "res-tuning[mha=prompt,ffn=adapter]"),
        Entry("few", "res-tuning", (("rank", 2), ("layers", [1, 2, 3]))),
    ]
    (read,) = parse_entries("res-tuning:zero=False")
    assert read.options == (("zero", False),)


@given(st.text(max_size=40))
def test_any_text_is_a_list_of_methods_or_refused_in_words(text):
    try:
        entries = parse_entries(text)
    except RestuningError as error:
        assert "do:" in str(error)
    else:
        assert all(entry.method and entry.label for entry in entries)


def test_choices_are_read_for_all_and_for_one_method():
    read = parse_choices(["lr=1e-3,5e-3", "full:lr=1e-4", "wd=0.1"])
    assert read == {"": {"lr": [0.001, 0.005], "wd": [0.1]}, "full": {"lr": [0.0001]}}


def test_a_method_chooses_between_its_own_values_and_those_of_all():
    protocol = GridProtocol(
        "restuning-tiny", choices=parse_choices(["lr=1,2", "wd=3,4", "full:lr=5"])
    )
    assert protocol.candidates(Entry("full", "full")) == [
        (("lr", 5), ("wd", 3)),
        (("lr", 5), ("wd", 4)),
    ]
    assert len(protocol.candidates(Entry("linear", "linear"))) == 4


def test_an_option_that_an_entry_fixes_is_not_chosen():
    protocol = GridProtocol("restuning-tiny", choices=parse_choices(["rank=1,2"]))
    assert protocol.candidates(Entry("x", "res-tuning", (("rank", 4),))) == [()]


def test_searches_come_before_final_runs_and_nothing_is_searched_without_a_choice():
    entries = parse_entries("linear,lora")
    searched = list_runs(
        GridProtocol("restuning-tiny", choices=parse_choices(["lr=1,2"])), [TASK], entries, 2
    )
    assert [r.stage for r in searched] == ["search"] * 4 + ["final"] * 4
    assert [r.stage for r in list_runs(GridProtocol("restuning-tiny"), [TASK], entries, 2)] == [
        "final"
    ] * 4


def test_runs_of_a_grid_have_names_of_their_own():
    protocol = GridProtocol("restuning-tiny", choices=parse_choices(["lr=1e-3,2e-3"]))
    entries = parse_entries("res-tuning[mha=prompt],res-tuning[mha=prefix],res-tuning:scale=none")
    names = [run.name for run in list_runs(protocol, [TASK], entries, 3)]
    assert len(set(names)) == len(names) == 3 * (2 + 3)


@given(st.text(max_size=200), st.text(max_size=200))
def test_a_part_of_a_path_is_one_name_and_keeps_different_names_apart(one, other):
    made = slug(one)
    assert made and "/" not in made and made not in (".", "..") and len(made) < 100
    assert one == other or slug(other) != made


def test_a_method_twice_is_refused():
    with pytest.raises(RestuningError, match="every entry once"):
        list_runs(GridProtocol("restuning-tiny"), [TASK], parse_entries("linear,linear"), 1)


def test_tasks_are_found_with_their_groups_and_other_folders_left_out(suite):
    found = find_tasks(str(suite))
    assert [(t.name, t.group) for t in found] == [("shades", "natural"), ("tones", "structured")]
    assert [t.name for t in find_tasks(str(suite), ["tones"])] == ["tones"]
    assert [t.name for t in find_tasks(str(suite / "shades"))] == ["shades"]


def test_a_wrong_name_of_a_task_is_answered_with_the_nearest(suite):
    with pytest.raises(RestuningError, match="did you mean shades"):
        find_tasks(str(suite), ["shade"])


@pytest.mark.parametrize("where", ["no-task", "nowhere/at/all"])
def test_a_folder_without_tasks_is_refused(suite, where):
    with pytest.raises(RestuningError, match="no task in this folder|no such folder"):
        find_tasks(str(suite / where))


def test_a_folder_of_another_protocol_is_refused_and_the_difference_named(grid):
    job = grid()
    other = GridProtocol("restuning-tiny", settings=FitSettings(epochs=2, batch_size=8, lr=1e-2))
    with pytest.raises(RestuningError, match="epochs: 1 then, 2 now"):
        open_grid(job.folder, other, job.runs)


def test_a_folder_takes_more_tasks_methods_and_seeds_but_no_other_choices(grid):
    grid()
    grid(methods="lora", tasks=("tones",), seeds=2)
    with pytest.raises(RestuningError, match="chooses between other settings"):
        grid(choices={"": {"lr": [1.0, 2.0]}})


def test_a_grid_of_pefts_lora_does_not_go_on_with_ours_under_its_name(grid):
    job = grid(methods="lora")
    description = read_json(job.folder / "grid.json")
    # As grids of then say it.
    description["choices"]["lora"] = [{"options": {}, "method": "lora"}]
    write_json(job.folder / "grid.json", description, sealed=True)
    with pytest.raises(RestuningError, match="--methods peft-lora"):
        open_grid(job.folder, job.protocol, job.runs)
    assert read_grid(job.folder)["choices"]["lora"]
    grid(methods="linear,peft-lora")


def test_a_malformed_description_of_a_grid_is_refused_in_words(grid):
    job = grid()
    for text in ("{", "[]", "{}", json.dumps({"format": 1, "protocol": 3})):
        (job.folder / "grid.json").write_text(text)
        with pytest.raises(RestuningError, match="cannot be read|malformed|not a result"):
            open_grid(job.folder, job.protocol, job.runs)
