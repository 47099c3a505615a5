"""What a user named is shown as it is written, whatever it means to rich, to HTML and to matplotlib."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from commands import restuning
from restuning import Host, load_backbone, methods, save
from restuning.search import Comparison
from restuning.task import Task
from restuning.training.run import Run

LABELS = ["[/INST]", "[red]", ":cat:", "[bold]x[/bold]", "$a_{$"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "[link=a] $x_{$ :dog:"
    rng = np.random.default_rng(0)
    for name in LABELS:
        # A slash cannot be in the name of a folder.
        folder = root / name.replace("/", "|")
        folder.mkdir(parents=True)
        for i in range(6):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"[{i}].png")
    return root


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    tiny = load_backbone("restuning-tiny")
    host = Host(tiny.model, *tiny.example)
    made = methods.build("linear", host, num_classes=len(LABELS))
    made.labels = LABELS
    folder = tmp_path_factory.mktemp("[green] tasks") / "[blink].task"
    said = tiny.preprocessing.to_dict()
    return save(made, host, folder, backbone="restuning-tiny", preprocessing=said)


def shown(done):
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def test_labels_are_shown_by_info(task):
    out = shown(restuning("info", task, COLUMNS="300"))
    assert all(label in out for label in LABELS)
    assert "[blink].task" in out


@pytest.mark.parametrize("more", [("--task",), ("--tasks",)])
def test_labels_and_paths_are_shown_by_predict(more, task, photos):
    out = shown(restuning("predict", photos / "[red]", *more, task, "--top", 5))
    assert all(f"[{i}].png" in out for i in range(6))
    assert more == ("--tasks",) or all(f"{label} (" in out for label in LABELS)


def test_names_are_shown_by_train_and_the_table_of_a_comparison(photos, tmp_path):
    out = tmp_path / "[magenta] $y_{$ :fire:"
    said = shown(
        restuning(
            *("train", photos, "--epochs", 1, "--out", out, "--store", tmp_path / "[s]"),
            COLUMNS="300",
        )
    )
    for name in (photos.name, out.name):
        assert name in said
    assert (out / "comparison.png").exists()
    said = shown(restuning("eval", out / "linear", photos, COLUMNS="300"))
    # A title is as wide as its table: where its lines break follows from how long a path is.
    assert photos.name in " ".join(said.split())


def test_a_picture_draws_names_with_dollars(tmp_path):
    metrics = {"method": "a", "test_accuracy": 0.5, "val_accuracy": None, "peak_memory_bytes": 1}
    metrics |= {"trainable_parameters": 1, "tuner_parameters": 0, "seconds": 3.0, "seed": 0}
    runs = (Run("a", Task(), Path(), {**metrics, "method": "$b_{$"}),)
    Comparison(runs, tmp_path).draw(tmp_path / "a.png", r"$\frac{$ on [red]")
    assert Image.open(tmp_path / "a.png").size[0] > 1000


def test_an_unknown_name_in_brackets_is_said_in_an_error(tmp_path):
    for words in (
        ("[/x]",),
        ("train", "[/x]"),
        ("info", "[/x]"),
        ("predict", "a", "--task", "[/x]"),
    ):
        done = restuning(*words, cwd=tmp_path)
        assert done.returncode in (1, 2)
        assert "[/x]" in done.stderr
        assert "Traceback" not in done.stderr
