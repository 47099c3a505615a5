"""A table of images is a task of a grid for each column of classes, and of a sweep for one."""

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import sounds
from restuning._errors import DataError, UnknownNameError
from restuning.bench import find_tasks
from restuning.cli.app import app

BENCH = ["bench", "run", "--epochs", "1", "--seeds", "1", "--batch-size", "8"]


def call(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    where = tmp_path_factory.mktemp("table")
    lines = ["picture,light,the side,number"]
    for n in range(48):
        draw = np.random.default_rng(n)
        pixels = draw.integers(0, 100, (32, 32, 3)) + (n % 2) * 120
        pixels[:, : 16 if n % 4 < 2 else 1] //= 4
        Image.fromarray(pixels.astype(np.uint8)).save(where / f"{n}.png")
        light, side = ("dark", "bright")[n % 2], ("left", "none")[n % 4 >= 2]
        lines.append(f"{n}.png,{light},{side},{n}")
    (where / "walls.csv").write_text("\n".join(lines))
    return where / "walls.csv"


def test_each_column_of_a_table_is_a_task_of_a_grid(table, tmp_path):
    told = (table, "--image", "picture", "--label", "light,the side", "--methods", "linear,ridge")
    done = call(*BENCH, *told, "--out", tmp_path / "grid", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"runs": 4, "failed": 0, "out": str(tmp_path / "grid")}
    call("bench", "report", tmp_path / "grid")
    text = (tmp_path / "grid/report/report.md").read_text()
    assert "walls-light" in text
    assert "walls-the_side" in text
    again = call(*BENCH, *told, "--out", tmp_path / "grid")
    assert "0 to make" in again.output


def test_a_grid_of_a_table_is_one_column_unless_several_are_named(table):
    (task,) = find_tasks(str(table), label="light")
    assert (task.name, task.options.label, task.options.problem) == (
        "walls",
        "light",
        "single-label",
    )
    both = find_tasks(str(table), ["walls-light"], label="light,the side", image="picture")
    assert [each.name for each in both] == ["walls-light"]
    # Of a data set of a hub as well, whose own types say which where nobody does.
    named = "hf:user/walls?revision=v1"
    of_hub = find_tasks(named, label="light,side")
    assert [(each.name, each.source) for each in of_hub] == [
        ("walls-light", named),
        ("walls-side", named),
    ]
    assert [(each.name, each.label) for each in find_tasks(named)] == [("walls", None)]
    with pytest.raises(UnknownNameError, match="walls-dark"):
        find_tasks(str(table), ["walls-dark"], label="light,the side")
    with pytest.raises(DataError, match="one name"):
        find_tasks(str(table), label="light,light")
    with pytest.raises(DataError, match="only a table says its columns"):
        find_tasks("digits", label="light")


def test_a_grid_of_sounds_fails_in_a_sentence(tmp_path):
    folder = tmp_path / "sounds"
    for split in ("train", "val", "test"):
        sounds.folder(folder / split, each=3)
    model = sounds.save("ast", tmp_path / "model")
    told = (folder, "--methods", "linear", "--backbone", f"hf:{model}", "--out", tmp_path / "grid")
    done = call(*BENCH, *told)
    assert done.exit_code == 1
    (failed,) = (tmp_path / "grid/runs").rglob("*.json")
    assert "a grid trains on images" in failed.read_text()


def test_a_sweep_trains_one_column_and_refuses_several(table, tmp_path):
    told = ["sweep", table, "--image", "picture", "--grid", "lr=1e-3,1e-2", "--seeds", "1"]
    told += ["--method", "linear", "--epochs", "2", "--store", tmp_path / "store"]
    done = call(*told, "--label", "light", "--out", tmp_path / "sweep")
    assert done.exit_code == 0, done.output
    several = call(*told, "--label", "light,the side", "--out", tmp_path / "several")
    assert several.exit_code != 0
    assert "several columns of answers" in several.output + str(several.exception)


def test_stores_of_a_grid_lie_in_the_folder_that_is_named_and_not_at_a_url(table, tmp_path):
    told = [*BENCH, table, "--image", "picture", "--label", "light", "--methods", "linear"]
    done = call(*told, "--out", tmp_path / "grid", "--store", tmp_path / "stores")
    assert done.exit_code == 0, done.output
    assert any((tmp_path / "stores").glob("*/manifest.json"))
    away = call(*told, "--out", tmp_path / "away", "--store", "s3://bucket/stores")
    assert away.exit_code == 1
    assert "takes stores in a folder, not at a URL" in away.output + str(away.exception)
    assert not (tmp_path / "away").exists()
