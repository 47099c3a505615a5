"""`auto` as an entry of a grid."""

import pytest

from restuning._errors import RestuningError, TrainingError
from restuning.bench import (
    Bench,
    find_tasks,
    list_runs,
    open_grid,
    parse_entries,
    read_protocol,
    read_results,
    run_grid,
)
from restuning.bench.report import write_report
from restuning.bench.studies.load_trained import load_trained
from restuning.search import CANDIDATES
from restuning.search.candidates import NOT_ASKED

NAMES = [c.method for c in CANDIDATES]


@pytest.fixture(scope="module")
def made(suite, tmp_path_factory):
    """A finished grid of `auto` under a budget that leaves only small steps, and of linear probing."""
    from restuning.bench import GridProtocol, Job
    from restuning.training import FitSettings

    folder = tmp_path_factory.mktemp("auto") / "grid"
    protocol = GridProtocol(
        "restuning-tiny",
        settings=FitSettings(epochs=1, batch_size=8, lr=1e-2),
        choices={"": {"lr": [1e-3, 1e-2]}},
    )
    entries = parse_entries("tight=auto:memory=11MiB,auto,linear")
    runs = list_runs(protocol, find_tasks(str(suite), ["shades"]), entries, 1)
    open_grid(folder, protocol, runs)
    assert run_grid(Job(protocol, folder, runs, keep=True)) == 0
    return folder, {r["label"]: r for r in read_results(folder) if r["stage"] == "final"}, runs


@pytest.mark.slow
def test_auto_needs_no_searches_of_the_grid(made):
    runs = made[2]
    assert {r.entry.label for r in runs if r.stage == "search"} == {"linear"}


@pytest.mark.slow
def test_a_run_of_auto_tells_what_it_chose_among_and_was_tested_as_all_are(made):
    results = made[1]
    auto, linear = results["auto"], results["linear"]
    assert auto["split"] == "test"
    assert auto["count"] == linear["count"]
    assert [row["method"] for row in auto["chosen"]["rows"]] == NAMES
    assert auto["setting"]["method"] in NAMES
    assert auto["settings"]["lr"] == auto["setting"]["lr"]
    assert auto["settings"]["epochs"] == auto["setting"]["epochs"]
    (taken,) = [row for row in auto["chosen"]["rows"] if row["why"] == "taken"]
    assert taken["method"] == auto["setting"]["method"]
    assert auto["chosen"]["validation_accuracy"] == taken["val_accuracy"]


@pytest.mark.slow
def test_the_cost_of_a_choice_is_part_of_the_cost_of_training(made):
    auto = made[1]["auto"]
    assert auto["seconds"]["train_cpu"] > auto["seconds"]["choice_cpu"] > 0
    assert made[1]["linear"]["seconds"]["choice_cpu"] is None


@pytest.mark.slow
def test_an_entry_may_have_a_budget(made):
    rows = {row["method"]: row for row in made[1]["tight"]["chosen"]["rows"]}
    assert rows["linear"]["status"] == "tried"
    assert rows["res-tuning"]["why"] == NOT_ASKED
    assert made[1]["tight"]["chosen"]["budget"]["memory"] == 11 * 2**20


@pytest.mark.slow
def test_its_kept_task_is_loaded_as_the_method_that_was_chosen(made):
    folder, results, runs = made
    (run,) = [r for r in runs if r.entry.label == "tight"]
    bench = Bench(read_protocol(folder), folder)
    tuned, result = load_trained(bench, run)
    assert tuned.task.method == results["tight"]["setting"]["method"] == result["setting"]["method"]


@pytest.mark.slow
def test_a_report_can_be_drawn_of_it(made):
    page, text = write_report(made[0], made[0] / "report")
    assert page.exists()
    assert f"method={made[1]['auto']['setting']['method']}" in text.read_text()


def test_a_budget_in_which_nothing_can_be_chosen_is_told_in_the_result(grid):
    job = grid("auto:memory=1MB")
    assert run_grid(job) == 1
    (result,) = read_results(job.folder)
    assert "no method can be chosen" in result["error"]
    assert not result["trace"], "it is a user's mistake"


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("auto:rank=4", "auto takes memory and minutes"),
        ("auto:memory=much", "not an amount of memory"),
        ("auto:minutes=soon", "not a budget of time"),
    ],
)
def test_a_budget_that_cannot_be_is_refused_before_any_run(grid, entry, words):
    with pytest.raises(RestuningError, match=words):
        grid(entry)


def test_settings_to_choose_from_are_refused_for_auto(grid):
    with pytest.raises(TrainingError, match="auto chooses its settings itself"):
        grid("auto", choices={"auto": {"lr": [1e-3, 1e-2]}})
