"""`recipes/paper/suites.py`: the paper's benchmarks by one command each, on little tasks made here."""

import runpy
import shutil
from pathlib import Path

import pytest

from restuning.bench import find_tasks
from restuning.bench.report import published_tables
from restuning.bench.studies.ablations import ABLATIONS, ablation_entries
from restuning.bench.suites import SUITES

RECIPE = runpy.run_path(str(Path(__file__).parents[3] / "recipes" / "paper" / "suites.py"))
QUICK = ["--backbone", "restuning-tiny", "--epochs", "1", "--batch-size", "8", "--seeds", "1"]


def call(capsys, *arguments):
    RECIPE["main"]([str(argument) for argument in arguments])
    return capsys.readouterr().out


def row(text, name):
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_cifar100_shows_ours_beside_what_is_published(suite, tmp_path, capsys):
    where = ["cifar100", "--data", suite / "shades", *QUICK, "--out", tmp_path / "g"]
    text = call(capsys, *where, "--methods", "linear,res-tuning-bypass")
    assert "Table 3c" in text and "runs failed" not in text
    ours, published = zip(*(cell.split(" / ") for cell in row(text, "shades")[1:]), strict=True)
    assert published == ("85.95", "89.33") and all(0 <= float(cell) <= 100 for cell in ours)
    assert set(row(text, "published accuracy reached?")[1:]) <= {"reached", "MISSED"}
    # The same command trains nothing again; what it shows is left as a file as well.
    again = call(capsys, *where, "--methods", "linear,res-tuning-bypass", "--show")
    assert again in text
    assert (tmp_path / "g" / "ours_and_published.md").read_text(encoding="utf-8") == again
    # A method that was not run has its published figure alone.
    more = call(capsys, *where, "--methods", "linear,res-tuning", "--show")
    assert (
        row(more, "shades")[2] == "- / 93.25" and row(more, "published accuracy reached?")[2] == "-"
    )


def test_a_mean_stands_only_where_every_task_of_the_suite_was_run(
    suite, tmp_path, monkeypatch, capsys
):
    shutil.copytree(suite / "shades", tmp_path / "vtab-1k" / "cifar")
    shutil.copytree(suite / "tones", tmp_path / "vtab-1k" / "dsprites_loc")
    # The folder that is given is meant, not the suite of its name in another place.
    monkeypatch.setenv("RESTUNING_DATA", str(tmp_path / "elsewhere"))
    monkeypatch.chdir(tmp_path)
    text = call(
        capsys,
        *["vtab-1k", "--data", "vtab-1k", *QUICK, "--out", "g"],
        *["--methods", "linear"],
    )
    assert row(text, "cifar")[1].endswith(" / 63.4") and row(text, "dtd") == ["dtd", "- / 63.2"]
    assert not row(text, "cifar")[1].startswith("-")
    assert row(text, "mean of tasks")[1] == "- / 52.94"
    assert row(text, "mean of groups")[1] == "- / 57.64"
    assert row(text, "published mean of groups reached?")[1] == "-"


def test_figures_are_missed_or_reached_to_the_digit_that_is_printed():
    verdict = RECIPE["verdict"]
    assert verdict(0.9325, 93.25) == "reached" and verdict(0.9, 89.33) == "reached"
    assert verdict(0.932, 93.25) == "MISSED" and verdict(0.9299, 93.25) == "MISSED"
    assert verdict(None, 93.25) == "-"
    assert verdict(0.9, None) == "-"


@pytest.mark.parametrize("table", RECIPE["METHODS"])
def test_every_published_row_and_column_that_is_named_is_there(table):
    rows = published_tables()[table]
    assert set(RECIPE["METHODS"][table].values()) <= set(rows["rows"])
    columns = RECIPE["COLUMNS"].get(table, {})
    assert set(columns.values()) <= set(rows["columns"])
    if table in RECIPE["COLUMNS"]:
        assert set(columns) == set(SUITES[table])


def test_every_combination_of_the_paper_has_its_published_figure():
    labels = [entry.label for entry in ablation_entries("combinations")]
    found = [RECIPE["published_row"]("combinations", label) for label in labels]
    assert sorted(found) == sorted(published_tables()["combinations"]["rows"])
    assert set(RECIPE["ABLATIONS"]) <= set(ABLATIONS)


def test_data_that_are_not_there_are_said_without_a_traceback(tmp_path, monkeypatch):
    monkeypatch.setenv("RESTUNING_DATA", str(tmp_path))
    for suite in ("vtab-1k", "fgvc"):
        with pytest.raises(SystemExit, match="no such folder of tasks"):
            RECIPE["main"]([suite, *QUICK, "--out", str(tmp_path / "g")])
    assert find_tasks("cifar100")[0].source == "torchvision:CIFAR100"
    assert not (tmp_path / "g").exists()


def test_tables_of_cifar100_are_not_drawn_beside_other_suites():
    read = RECIPE["read_arguments"]
    assert read(["cifar100", "--data", "x", "--ablation", "bypass"]).ablation == "bypass"
    with pytest.raises(SystemExit):
        read(["vtab-1k", "--data", "x", "--ablation", "bypass"])
