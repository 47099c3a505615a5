"""What training, `eval`, `report` and `predict` leave in files, of every kind of answer of a table."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from commands import restuning
from restuning import Predictor, train
from restuning._errors import FormatError
from restuning._files import writing_rows
from restuning.problems import SingleLabel
from restuning.training.report_again import CHANGED, open_run
from restuning.training.run_report import read_history

HOSTILE = "<script>alert(1)</script>"
KINDS = {"kind": "single-label", "tags": "multi-label", "shade": "regression"}
FORWARD = 1e-4
"""A forward of another batch size."""


def rows_of(file):
    text = Path(file).read_text(encoding="utf-8")
    if Path(file).suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines()]
    return list(csv.DictReader(text.splitlines()))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    rng = np.random.default_rng(0)
    lines = ["path,kind,tags,shade"]
    for n in range(60):
        shade = rng.uniform(20, 235)
        pixels = (shade + rng.normal(0, 9, (32, 32, 3))).clip(0, 255).astype("uint8")
        Image.fromarray(pixels).save(folder / f"{n}.png")
        kind = "dark" if shade < 128 else HOSTILE
        known = (("dim", shade < 90), ("grey", 60 < shade < 150), ("glaring", shade > 180))
        tags = [tag for tag, there in known if there]
        lines.append(f"{n}.png,{kind},{'|'.join(tags)},{shade:.4f}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    return folder / "table.csv"


@pytest.fixture(scope="module")
def run(table, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "shades"
    done = restuning(
        *("train", table, "--image", "path", "--label", ",".join(KINDS)),
        *("--method", "ridge", "--out", out),
    )
    assert done.returncode == 0, done.stderr
    return out


def test_training_leaves_a_page_of_each_column_and_none_where_none_is_wanted(run, table, tmp_path):
    for column in KINDS:
        text = (run / "runs" / column / "report.html").read_text()
        assert f"<title>{column} of table" in text
        assert f"restuning eval {run / f'{column}.task'} {table}" in text
        assert f"--label {column}" in text
        assert "<script" not in text
    assert "&lt;script&gt;" in (run / "runs" / "kind" / "report.html").read_text()
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "report.html").write_text("about a task that was here before")
    done = restuning(
        *("train", table, "--image", "path", "--label", "kind", "--method", "ridge"),
        *("--out", tmp_path / "none", "--no-report"),
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "none" / "report.html").exists()


def test_a_report_is_made_again_from_what_the_run_left(run, tmp_path):
    def without_digits(text):
        return re.sub(r"[\d.]+", "#", text)

    before = {c: (run / "runs" / c / "report.html").read_text() for c in KINDS}
    (run / "runs" / "kind" / "report.html").unlink()
    done = restuning("report", run)
    assert done.returncode == 0, done.stderr
    for column, text in before.items():
        again = (run / "runs" / column / "report.html").read_text()
        # Answers of a live forward are those of stored features but for their last digits.
        assert without_digits(again) == without_digits(text)
    done = restuning("report", run / "runs" / "kind", "--out", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page.html").exists()


def test_a_report_about_other_data_than_the_run_says_so(run, table, tmp_path):
    changed = table.parent / "changed.csv"
    lines = table.read_text().splitlines()
    lines[1] = lines[1].replace("dark", "?").replace(HOSTILE, "dark").replace("?", HOSTILE)
    changed.write_text("\n".join(lines) + "\n")
    folder = run / "runs" / "kind"
    done = restuning("report", folder, changed, "--out", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    assert "about other data than the run" in done.stderr
    assert CHANGED in (tmp_path / "page.html").read_text()
    assert CHANGED not in (folder / "report.html").read_text()


def test_a_test_on_data_that_changed_since_training_says_so(run, table, tmp_path):
    changed = tmp_path / "table.csv"
    shutil.copytree(table.parent, tmp_path, dirs_exist_ok=True)
    lines = changed.read_text().splitlines()
    changed.write_text("\n".join([*lines[:5], *lines[6:]]) + "\n")
    ask = ("--image", "path", "--label", "kind")
    for data, warned in ((table, False), (changed, True)):
        done = restuning("eval", run / "kind.task", data, *ask)
        assert done.returncode == 0, done.stderr
        assert ("have changed since" in done.stderr) == warned
    # Of train and val together nothing is known that a test could be compared with.
    alone = ("train", changed, *ask, "--method", "ridge", "--no-report")
    for more, warned in (((), True), (("--final",), False)):
        out = tmp_path / f"run{len(more)}"
        assert restuning(*alone, *more, "--out", out).returncode == 0
        changed.write_text("\n".join(lines[:50]) + "\n")
        done = restuning("eval", out, changed, *ask)
        assert ("have changed since" in done.stderr) == warned, done.stderr
        changed.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("line", [b'{"epoch": 1, "val_accuracy": "all"}', b"\xff", b"{"])
def test_a_log_that_tells_no_figures_is_refused_by_its_line(tmp_path, line):
    good = b'{"epoch": 0, "loss": 1.0, "accuracy": 0.5, "val_loss": null, "val_accuracy": null}\n'
    (tmp_path / "log.jsonl").write_bytes(good)
    assert len(read_history(tmp_path, SingleLabel())) == 1
    (tmp_path / "log.jsonl").write_bytes(good + line)
    with pytest.raises(FormatError, match="line 2"):
        read_history(tmp_path, SingleLabel())


def test_a_report_of_what_is_none_is_refused_in_words(run, table, tmp_path):
    for arguments, words in (
        ((tmp_path,), "no run is in this folder"),
        ((run, "--out", tmp_path / "x.html"), "has 3 runs"),
        ((run / "runs" / "kind", tmp_path / "gone.csv"), "gone.csv"),
    ):
        done = restuning("report", *arguments)
        assert done.returncode
        assert words in re.sub(r"[\s│╭╮╰╯─]+", " ", done.stderr)
        assert "Traceback" not in done.stderr
    (tmp_path / "taken.html").mkdir()
    done = restuning("report", run / "runs" / "kind", "gone.csv", "--out", tmp_path / "taken.html")
    # Before the data are looked at.
    assert done.returncode == 1 and "could not be written" in done.stderr
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("metrics.json", "settings.json"):
        (alone / name).write_text((run / "runs" / "kind" / name).read_text())
    settings = json.loads((alone / "settings.json").read_text())
    (alone / "settings.json").write_text(json.dumps({**settings, "data": "hf:somebody/else"}))
    done = restuning("report", alone)
    assert done.returncode == 1
    assert "data of a hub are named by who asks" in done.stderr
    (alone / "settings.json").write_text(json.dumps({**settings, "data": "photos/gone"}))
    done = restuning("report", alone)
    assert done.returncode == 1
    told = " ".join(done.stderr.split())
    assert "data of a run are not where they were" in told
    assert "settings.json" in told and "photos/gone, in " in told
    assert f"restuning report {alone} DATA" in done.stderr
    for name, entry in (
        ("settings.json", {"max_tokens": "many"}),
        ("metrics.json", {"seconds": []}),
    ):
        whole = json.loads((run / "runs" / "kind" / name).read_text())
        (alone / "settings.json").write_text((run / "runs" / "kind" / "settings.json").read_text())
        (alone / name).write_text(json.dumps({**whole, **entry}))
        done = restuning("report", alone)
        assert done.returncode == 1
        assert "what a run left is malformed" in done.stderr


def test_a_second_evaluation_leaves_no_predictions_of_the_first(run, table, tmp_path):
    for rows, other in (("csv", "jsonl"), ("jsonl", "csv"), ("csv", "jsonl")):
        done = restuning(
            *("eval", run / "kind.task", table, "--image", "path", "--label", "kind"),
            *("--out", tmp_path, "--rows", rows),
        )
        assert done.returncode == 0, done.stderr
        assert (tmp_path / f"predictions.{rows}").exists()
        assert not (tmp_path / f"predictions.{other}").exists()


def test_eval_replaces_its_own_files_and_refuses_to_replace_those_of_others(run, table, tmp_path):
    def ask(column, out, data=table):
        return restuning("eval", run / f"{column}.task", data, "--label", column, "--out", out)

    assert ask("kind", tmp_path / "x").returncode == 0
    assert ask("kind", tmp_path / "x").returncode == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "x").iterdir()}
    other = table.parent / "other.csv"
    other.write_text(table.read_text())
    for column, data, said in (
        ("shade", table, "shade.task"),
        ("kind", other, "other"),
    ):
        done = ask(column, tmp_path / "x", data)
        assert done.returncode == 1
        told = " ".join(done.stderr.split())
        assert "would be replaced" in told and said in told and "another --out" in told
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "x").iterdir()}
    # Nor the page of a run, nor a table that somebody calls so.
    done = ask("kind", run / "runs" / "kind")
    assert done.returncode == 1 and "are of no evaluation" in " ".join(done.stderr.split())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "outputs.csv").write_text("mine\n")
    assert ask("kind", tmp_path / "mine").returncode == 1
    assert (tmp_path / "mine" / "outputs.csv").read_text() == "mine\n"


@pytest.mark.parametrize("name", ["predictions.jsonl", "eval.json", "report.html"])
def test_a_place_that_eval_cannot_write_to_is_told_before_anything_is_read(run, tmp_path, name):
    (tmp_path / name).mkdir()
    done = restuning("eval", run / "kind.task", "gone", "--out", tmp_path, "--rows", "jsonl")
    assert done.returncode == 1
    assert f"{name}" in done.stderr and "could not be written" in done.stderr
    done = restuning("eval", run / "kind.task", "gone", "--rows", "jsonl")
    assert done.returncode == 2 and "--out" in done.stderr


@pytest.mark.parametrize("rows", ["csv", "jsonl"])
@pytest.mark.parametrize("column", KINDS)
def test_eval_leaves_its_figures_every_answer_and_a_page(run, table, tmp_path, column, rows):
    done = restuning(
        *("eval", run / f"{column}.task", table, "--image", "path", "--label", column),
        *("--out", tmp_path, "--rows", rows, "--json"),
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert json.loads((tmp_path / "eval.json").read_text()) == told
    answers = rows_of(tmp_path / f"predictions.{rows}")
    assert len(answers) == told["count"] == 12
    assert "<script" not in (tmp_path / "report.html").read_text()
    trained = json.loads((run / "metrics.json").read_text())["columns"][column]["test"]
    for name, value in trained.items():
        assert told[name] == pytest.approx(value, abs=FORWARD, rel=FORWARD)
    for row in answers:
        assert Path(row["input"]).exists()
    if column == "kind":
        right = sum(row["true"] == row["answer"] for row in answers)
        assert right / 12 == pytest.approx(told["accuracy"])
    if column == "shade":
        off = [abs(float(row["true"]) - float(row["answer"])) for row in answers]
        assert np.mean(off) == pytest.approx(told["mae"], rel=FORWARD)


def test_predict_leaves_a_row_an_input_with_columns_by_problem(run, table, tmp_path):
    images = [table.parent / f"{n}.png" for n in range(5)]
    done = restuning("predict", *images, "--task", run, "--out", tmp_path / "answers.csv")
    assert done.returncode == 0, done.stderr
    assert "5 rows in" in done.stdout
    rows = rows_of(tmp_path / "answers.csv")
    assert [row["image"] for row in rows] == list(map(str, images))
    predictor = Predictor.load(run)
    for row, answer in zip(rows, predictor(images), strict=True):
        assert row["kind answer"] == answer["kind"].label
        assert float(row["kind probability"]) == pytest.approx(
            answer["kind"].probability, abs=FORWARD
        )
        assert row["tags answer"] == "|".join(
            label for label in predictor.labels["tags"] if label in answer["tags"].label.split(", ")
        )
        assert "tags probability of dim" in row
        assert float(row["shade answer"]) == pytest.approx(answer["shade"].value, rel=FORWARD)
        assert float(row["shade error"]) == pytest.approx(answer["shade"].error)
    done = restuning(
        *("predict", *images, "--task", run / "kind.task", "--top", 2),
        *("--out", tmp_path / "answers.jsonl", "--json"),
    )
    assert (done.returncode, done.stdout) == (0, "")
    first, *_ = rows_of(tmp_path / "answers.jsonl")
    assert first.keys() == {"image", "answer", "probability", "answer 2", "probability 2"}
    assert {first["answer"], first["answer 2"]} == {"dark", HOSTILE}


def test_the_data_of_a_run_are_found_from_any_folder(table, tmp_path, monkeypatch):
    """Also where the command that trained had their path from the folder that it was called in."""
    (tmp_path / "work" / "data").mkdir(parents=True)
    for file in table.parent.iterdir():
        (tmp_path / "work" / "data" / file.name).write_bytes(file.read_bytes())
    monkeypatch.chdir(tmp_path / "work")
    asked = {"image": "path", "label": "kind", "method": "ridge", "report": False}
    run = train("data/table.csv", out="runs/x", progress=False, **asked)
    assert open_run(run.folder).call["data"] == str(Path("data/table.csv"))
    # All of it somewhere else, and the command somewhere else again.
    (tmp_path / "work").rename(tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = open_run(tmp_path / "moved" / "runs" / "x")
    assert Path(found.call["data"]) == tmp_path / "moved" / "data" / "table.csv"
    # Of data that somebody else wrote into the settings nothing is known.
    settings = tmp_path / "moved" / "runs" / "x" / "settings.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "data": "other.csv"}))
    with pytest.raises(FormatError, match="not where they were"):
        open_run(tmp_path / "moved" / "runs" / "x")


def test_rows_are_written_whole_or_not_at_all(tmp_path, run, table):
    file = tmp_path / "rows.csv"
    file.write_text("before\n")
    with pytest.raises(RuntimeError), writing_rows(file) as write:
        write({"a": 1, "b": 'x,"y"\nz'})
        raise RuntimeError
    assert file.read_text() == "before\n"
    # An input that cannot be read is not a file that cannot be written.
    with pytest.raises(PermissionError, match="an input"), writing_rows(file) as write:
        write({"a": 1, "b": 2})
        raise PermissionError("an input")
    assert file.read_text() == "before\n"
    with writing_rows(file) as write:
        write({"a": 1, "b": 'x,"y"\nz'})
    with file.open(newline="") as opened:
        assert list(csv.DictReader(opened)) == [{"a": "1", "b": 'x,"y"\nz'}]
    assert [p.name for p in tmp_path.iterdir()] == ["rows.csv"]
    image = table.parent / "0.png"
    for out, words in ((tmp_path / "answers.xlsx", ".csv or .jsonl"), (tmp_path, ".csv or .jsonl")):
        done = restuning("predict", image, "--task", run, "--out", out)
        assert done.returncode == 1
        assert words in done.stderr
