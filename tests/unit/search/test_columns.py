"""A table of several columns of answers: a task each, from one pass over the images."""

import json

import pytest
import scenes
import torch
from typer.testing import CliRunner

import restuning
from restuning import Bank, FitSettings, Predictor, evaluate_task, load_backbone, train
from restuning._errors import DataError, FormatError, TrainingError, WrongTaskError
from restuning._files import read_json, write_json
from restuning.backbones import Backbone
from restuning.cli.app import app
from restuning.data.data import DataOptions
from restuning.features import StoreOptions
from restuning.search import Candidate, choose_method
from restuning.search.columns import Columns, name_folders
from restuning.search.sweep import SweepRequest, run_sweep
from restuning.serve import Service, open_task
from restuning.training.run import Source

ROWS = 40
KINDS = {"ground": "single-label", "shapes": "multi-label", "count": "regression"}
LABEL = ",".join(KINDS)
SAME_TOLERANCE = 1e-5
"""Products of other sizes round elsewhere."""


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return scenes.write_table(tmp_path_factory.mktemp("scenes"), ROWS, size=32)


@pytest.fixture(scope="module")
def tiny():
    return load_backbone("restuning-tiny")


@pytest.fixture(scope="module")
def trained(table, tiny, tmp_path_factory):
    out, forwards = tmp_path_factory.mktemp("out"), []
    handle = tiny.model.register_forward_hook(lambda _, args, __: forwards.append(len(args[0])))
    lines: list[str] = []
    hosts, own = [], Backbone.host
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESTUNING_CACHE", str(out / "cache"))
        patch.setattr(Backbone, "host", lambda self: hosts.append(own(self)) or hosts[-1])
        found = train(
            table,
            backbone=tiny,
            method="ridge",
            image="path",
            label=list(KINDS),
            out=out / "run",
            store=out / "stores",
            log=lines.append,
        )
    handle.remove()
    return found, forwards, lines, hosts


def test_three_columns_of_three_kinds_are_trained_from_one_pass(trained):
    found, forwards, lines, _ = trained
    assert isinstance(found, Columns)
    # Before and after the pass single examples, by which sites and rounding are proved.
    begin = forwards.index(round(0.7 * ROWS))
    assert sum(size for size in forwards[begin:] if size > 1) == ROWS
    assert sum("reused" in line for line in lines) == 2
    assert any("count: regression, assumed of numbers" in line for line in lines)


def test_one_host_serves_all_columns(trained):
    """The hooks of each would run in every forward of the backbone, whose sites they would prove once more."""
    *_, hosts = trained
    assert len(hosts) == 1


def test_what_is_left_says_problem_and_figures_of_each_column(trained):
    found, *_ = trained
    written = read_json(found.folder / "metrics.json")
    assert written == json.loads(json.dumps(found.metrics))
    assert {c: told["problem"] for c, told in written["columns"].items()} == KINDS
    of_classes = {"accuracy", "balanced_accuracy", "f1_macro", "auroc", "nll", "ece"}
    assert of_classes <= written["columns"]["ground"]["test"].keys()
    assert written["columns"]["count"]["test"].keys() == {"r2", "mae", "rmse"}
    assert "mean_average_precision" in written["columns"]["shapes"]["test"]
    for column, run in found.runs.items():
        assert run.task_folder == found.folder / f"{column}.task"
        assert run.test_score == written["columns"][column]["test"][run.metric]
        assert found[column] is run
        assert run.metrics["test"] == written["columns"][column]["test"]
    assert found["count"].test_accuracy is None
    assert found["count"].row()["metric"] == "r2"
    assert found["count"].task.problem.error is not None


def test_predicting_with_the_folder_answers_all_columns_from_one_forward(trained, table):
    found, *_ = trained
    predictor = Predictor.load(found.folder)
    assert predictor.forwards == 1
    (answer,) = predictor(table.parent / "images" / "0000.png")
    assert answer["ground"].label in scenes.GROUNDS
    assert answer["count"].error > 0
    assert all(choice.probability >= 0.5 for choice in answer["shapes"].tags)
    alone = Predictor.load(found.folder / "count.task")
    (same,) = alone(table.parent / "images" / "0000.png")
    assert same.value == pytest.approx(answer["count"].value, abs=1e-4)
    assert same.label == answer["count"].label
    for wrong in ("probability", "tags"):
        with pytest.raises(WrongTaskError, match="no task here"):
            getattr(same, wrong)


def test_the_bank_of_all_columns_answers_as_each_alone(trained, tiny):
    found, *_ = trained
    host = tiny.host()
    tasks = {column: run.task for column, run in found.runs.items()}
    bank = Bank(tasks)
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    answers = bank(host.features(x, keep=bank.keep))
    for column, task in tasks.items():
        alone = restuning.Tuned(host, task)(x)
        torch.testing.assert_close(answers[column], alone, rtol=SAME_TOLERANCE, atol=SAME_TOLERANCE)


@pytest.mark.parametrize("column", KINDS)
def test_a_column_is_tested_again_on_the_rows_that_were_not_trained_on(trained, table, column):
    found, *_ = trained
    predictor = Predictor.load(found.folder / f"{column}.task")
    told = evaluate_task(predictor, table, DataOptions(label=column))
    run = found[column]
    assert told["count"] == ROWS - round(0.7 * ROWS) - round(0.1 * ROWS)
    assert told[run.metric] == pytest.approx(run.test_score, abs=1e-4)
    assert ("nll" in told) == (column != "count")


def test_a_task_of_one_kind_is_not_tested_on_a_column_of_another(trained, table):
    found, *_ = trained
    predictor = Predictor.load(found.folder / "ground.task")
    with pytest.raises(DataError, match="not those of the task|another kind"):
        evaluate_task(predictor, table, DataOptions(label="count"))


@pytest.mark.slow
def test_at_the_command_line_it_is_two_commands(table, tmp_path):
    run = CliRunner().invoke
    given = ["--image", "path", "--label", LABEL, "--method", "linear", "--epochs", "1"]
    places = ["--out", str(tmp_path / "run"), "--store", str(tmp_path / "stores")]
    done = run(app, ["train", str(table), *given, *places])
    assert done.exit_code == 0, (done.output, done.exception)
    assert "mean average precision" in done.output
    image = str(table.parent / "images" / "0001.png")
    done = run(app, ["predict", image, "--task", str(tmp_path / "run"), "--json"])
    assert done.exit_code == 0, (done.output, done.exception)
    line = json.loads(done.stdout.splitlines()[0])
    assert list(line["tasks"]) == list(KINDS)
    assert line["tasks"]["count"][0].keys() == {"label", "value", "error"}
    done = run(app, ["predict", image, "--task", str(tmp_path / "run")])
    assert "3 tasks, 1 backbone forward a batch" in done.output
    again = run(app, ["train", str(table), *given, *places])
    assert again.exit_code == 0, (again.output, again.exception)
    settings = tmp_path / "run" / "runs" / "count" / "settings.json"
    assert json.loads(settings.read_text())["problem"] == "regression"


def test_a_damaged_list_of_columns_is_refused(trained, tmp_path):
    found, *_ = trained
    (tmp_path / "folder").mkdir()
    for name in ("../elsewhere", "..", "folder", "none.task", None):
        write_json(tmp_path / "metrics.json", {"columns": {"ground": {"task": name}}})
        with pytest.raises(FormatError, match="not all there"):
            Predictor.load(tmp_path)


ONE = (Candidate("linear", (1e-2,), 2, warm_start=False),)


@pytest.mark.parametrize("column", ["shapes", "count"])
def test_a_method_is_chosen_by_the_figure_of_the_problem(trained, table, tiny, tmp_path, column):
    source = Source(str(table), label=column, store=StoreOptions(tmp_path))
    inputs = source.open(tiny.host(), tiny)
    settings = FitSettings(epochs=2, batch_size=16)
    choice = choose_method(inputs, settings, tmp_path / "choice", candidates=ONE)
    (row,) = choice.rows
    key = f"val_{inputs.data.problem.metric}"
    assert row["metric"] == inputs.data.problem.metric
    assert row[key] is not None
    assert row["standard_error"] > 0
    assert "val_accuracy" not in row
    assert (choice.problem.spec().get("error") is not None) == (column == "count")
    again = choose_method(inputs, settings, tmp_path / "choice", candidates=ONE)
    assert again.rows == choice.rows


def test_a_sweep_of_numbers_is_compared_by_them_and_its_tasks_have_error_bars(
    table, tiny, tmp_path
):
    source = Source(str(table), label="count", store=StoreOptions(tmp_path))
    settings = FitSettings(epochs=2, batch_size=16)
    request = SweepRequest(source, "linear", {"lr": [1e-3, 3e-2]}, (0,), settings, tiny)
    report = run_sweep(request, out=tmp_path / "sweep").report
    assert report["metric"] == "r2"
    assert all(len(row["val_r2"]) == 1 for row in report["settings"])
    assert report["final"]["mean"] == report["final"]["test_r2"][0]
    task = restuning.load(tmp_path / "sweep" / "final" / "seed-0.task", tiny.host())
    assert task.problem.error is not None
    assert (tmp_path / "sweep" / "sweep.png").exists()


def test_several_methods_for_several_columns_are_refused(table, tiny, tmp_path):
    with pytest.raises(TrainingError, match="one method"):
        train(table, backbone=tiny, method=["linear", "ridge"], label=LABEL, out=tmp_path / "x")


def test_a_list_of_one_method_is_refused_by_what_it_is(table, tiny, tmp_path):
    with pytest.raises(TrainingError, match=r"a list of methods: \['linear'\]"):
        train(table, backbone=tiny, method=["linear"], label=list(KINDS), out=tmp_path / "x")


def test_a_list_of_one_column_is_a_list(table, tiny):
    assert list(Source(str(table), label=["count"]).columns(tiny)) == ["count"]
    assert Source(str(table), label="count").columns(tiny) == {}


@pytest.mark.slow
def test_codes_of_classes_are_tested_as_the_classes_they_were_trained_as(table, tiny, tmp_path):
    told = {"label": "count", "problem": "single-label"}
    run = train(table, backbone=tiny, method="ridge", out=tmp_path, store=False, **told)
    again = evaluate_task(Predictor.load(run.task_folder), table, DataOptions(label="count"))
    assert again["accuracy"] == pytest.approx(run.test_accuracy)


def test_one_task_is_not_opened_of_a_folder_of_several(trained):
    found, *_ = trained
    with pytest.raises(FormatError, match="several tasks") as told:
        open_task(found.folder)
    assert "ground.task" in told.value.fix


def test_folders_have_names_whatever_columns_are_called():
    assert name_folders(["a/b", "..", "age in years"]) == {
        "a/b": "a_b",
        "..": "_",
        "age in years": "age in years",
    }
    with pytest.raises(DataError, match="one folder"):
        name_folders(["a/b", "a:b"])
    long = name_folders(["é" * 300 + "1", "é" * 300 + "2"])
    assert len(set(long.values())) == 2
    assert all(len(name.encode()) < 120 for name in long.values())


def test_a_server_answers_with_numbers(trained):
    found, *_ = trained
    service = Service(found.folder / "count.task")
    service.warm_up()
    assert service.entries["count"].problem.kind == "regression"
    assert service.drain(10)
