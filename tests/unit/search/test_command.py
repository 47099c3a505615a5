"""`restuning train --method auto`: what a person sees, what is left on disk, and mistakes in words."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from restuning.cli import main
from restuning.cli.app import app
from restuning.search import CANDIDATES, choose_method
from restuning.search import train as search_train
from restuning.search.candidates import Candidate
from restuning.task import describe

MOST_COLUMNS = 80


def call(*arguments):
    return CliRunner(env={"COLUMNS": str(MOST_COLUMNS)}).invoke(app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def trained(shades, tmp_path_factory):
    """A folder without a validation split, under a budget that leaves the larger methods out."""
    root = tmp_path_factory.mktemp("auto")
    command = [
        "train",
        shades,
        "--method",
        "auto",
        "--memory",
        "11MiB",
        "--epochs",
        "1",
        "--batch-size",
        "8",
        "--out",
        root / "run",
        "--store",
        root / "store",
    ]
    done = call(*command)
    assert done.exit_code == 0, (done.output, done.exception)
    return root / "run", done.output, command


@pytest.mark.slow
def test_a_person_sees_every_candidate_and_why(trained):
    folder, told, _ = trained
    lines = " ".join(told.split())
    assert "no validation split: 4 of 20 training examples are held out" in lines
    assert all(candidate.method in told for candidate in CANDIDATES)
    assert "left out: trains through the backbone" in lines
    assert "within" in lines or "behind" in lines or "ahead" in lines or "equal" in lines
    assert "take " in told
    without_paths = [line for line in told.splitlines() if str(folder.parent) not in line]
    assert max(map(len, without_paths)) <= MOST_COLUMNS + 20, "lines with a path alone run over"


@pytest.mark.slow
def test_the_choice_is_kept_with_the_task_and_the_figures(trained):
    folder, _, _ = trained
    metrics = json.loads((folder / "metrics.json").read_text())
    kept = json.loads((folder / "choice.json").read_text())
    (task,) = folder.glob("*.task")
    assert kept == metrics["choice"] == json.loads((task / "choice.json").read_text())
    assert metrics["method"] == kept["method"] == describe(task)["task"]["method"]
    assert metrics["settings"]["lr"] == kept["lr"]
    assert metrics["settings"]["epochs"] == kept["epochs"]
    assert metrics["val_accuracy"] is None, "the final run trains on both splits"


@pytest.mark.slow
def test_the_final_run_trains_on_what_was_held_out_as_well(trained):
    folder = trained[0]
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    metrics = json.loads((folder / "metrics.json").read_text())
    # 20 examples in batches of 8.
    assert log[-1]["step"] == 3 * metrics["settings"]["epochs"]


@pytest.mark.slow
def test_the_same_command_again_takes_everything_from_disk_and_ends_the_same(trained):
    folder, _, command = trained
    before = json.loads((folder / "metrics.json").read_text())
    done = call(*command, "--json")
    assert done.exit_code == 0, done.output
    row = json.loads(done.stdout[done.stdout.index("{") :])
    assert row["test_accuracy"] == before["test_accuracy"]
    assert row["choice"] == before["choice"]


@pytest.fixture
def one_candidate(monkeypatch):
    """A choice that takes seconds: among one method, whose final run goes on from its trial."""
    one = (Candidate("linear", (5e-3,), 4, warm_start=True),)
    monkeypatch.setattr(search_train, "choose_method", partial(choose_method, candidates=one))


def weights_of(folder):
    (task,) = folder.glob("*.task")
    return load_file(task / "weights.safetensors")


def test_the_settings_of_a_choice_given_back_make_the_same_run(shades, tmp_path, one_candidate):
    more = ("--memory", "2GiB", "--epochs", 2, "--batch-size", 8, "--seed", 3)
    more += ("--label-smoothing", 0.1, "--store", tmp_path / "store")
    first, again = tmp_path / "first", tmp_path / "again"
    done = call("train", shades, "--method", "auto", *more, "--out", first)
    assert done.exit_code == 0, (done.output, done.exception)
    assert json.loads((first / "choice.json").read_text())["goes_on"]
    # The file alone: data, limits and all that the choice began with.
    done = call("train", shades, "--config", first / "settings.json", "--out", again)
    assert done.exit_code == 0, (done.output, done.exception)
    assert "went on from the weights" not in done.output
    one, other = weights_of(first), weights_of(again)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    settings = [json.loads((folder / "settings.json").read_text()) for folder in (first, again)]
    assert settings[0] == settings[1]
    assert (settings[0]["method"], settings[0]["epochs"]) == ("auto", 2)
    # What was found stands with the figures.
    metrics = json.loads((first / "metrics.json").read_text())
    assert (metrics["method"], metrics["settings"]["lr"]) == ("linear", 5e-3)


def test_settings_of_a_choice_from_before_say_what_is_not_reproduced(shades, tmp_path):
    older = {"method": "linear", "epochs": 1, "lr": 5e-3, "final": True, "options": {}}
    (tmp_path / "settings.json").write_text(json.dumps(older))
    more = ("--store", tmp_path / "store", "--out", tmp_path / "run", "--batch-size", 8)
    for goes_on, told in ((True, True), (False, False)):
        (tmp_path / "choice.json").write_text(json.dumps({"goes_on": goes_on}))
        done = call("train", shades, "--config", tmp_path / "settings.json", *more)
        assert done.exit_code == 0, (done.output, done.exception)
        assert ("went on from the weights of a trial" in done.output) == told


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--method", "auto", "--lr", "1e-3"), "chooses this itself"),
        (("--method", "auto", "--rank", "4"), "chooses this itself"),
        (("--method", "auto", "--no-cache"), "stored features first"),
        (("--method", "auto", "--augment", "timm"), "stored features first"),
        (("--method", "auto", "--memory", "plenty"), "not an amount of memory"),
        (("--method", "auto", "--memory", "1MB"), "no method can be chosen"),
        (("--method", "auto", "--minutes", "0"), "not a budget of time"),
        (("--method", "auto", "--minutes", "0.0001"), "no method can be chosen"),
        (("--method", "linear", "--minutes", "3"), "a budget is for --method auto"),
        (("--memory", "much"), "not an amount of memory"),
        (("--method", "atuo"), "did you mean auto?"),
    ],
)
def test_mistakes_are_told_in_words(shades, tmp_path, monkeypatch, capsys, more, words):
    monkeypatch.setattr(
        "sys.argv",
        [
            "restuning",
            "train",
            str(shades),
            *more,
            "--epochs",
            "1",
            "--out",
            str(tmp_path / "run"),
            "--store",
            str(tmp_path / "store"),
        ],
    )
    with pytest.raises(SystemExit) as ended:
        main()
    told = " ".join(capsys.readouterr().err.split())
    assert ended.value.code not in (0, None)
    assert words in told
    assert "do:" in told
    assert "Traceback" not in told
