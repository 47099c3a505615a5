"""Where there is no test split the validation accuracy is shown, and it is said that it is one."""

import json

import numpy as np
import pytest
from PIL import Image

from commands import restuning
from restuning.search import Comparison
from restuning.task import Task
from restuning.training.run import Run, measured_on


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label, level in (("cat", 60), ("dog", 200)):
            for i in range(6):
                place = tmp_path / "photos" / split / label / f"{i}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                pixels = rng.integers(level - 40, level + 40, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(place)
    return tmp_path / "photos"


def test_the_table_the_card_and_the_metrics_of_a_run_say_so(photos, tmp_path):
    words = ("train", photos, "--method", "linear", "--epochs", 5, "--store", tmp_path / "s")
    out = tmp_path / "run"
    done = restuning(*words, "--out", out)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["test_accuracy"] is None
    assert metrics["accuracy_on"] == "validation"
    percent = f"{metrics['val_accuracy']:.2%}"
    assert percent in done.stdout
    assert "validation" in done.stdout
    assert "test accuracy" not in done.stdout
    assert "no test split" in done.stdout
    card = (out / "photos.task" / "README.md").read_text()
    assert "| validation accuracy | " in card
    assert "test accuracy" not in card
    final = restuning(*words, "--out", tmp_path / "final", "--final")
    assert final.returncode == 0, final.stderr
    assert "no accuracy is known" in final.stdout


def run(test, val):
    row = {"method": "a", "test_accuracy": test, "val_accuracy": val, "peak_memory_bytes": 1}
    row |= {"trainable_parameters": 1, "tuner_parameters": 0, "seconds": 1.0, "seed": 0}
    return Run("a", Task(), None, row)


@pytest.mark.parametrize(
    ("test", "val", "split"),
    [
        (0.0, 0.9, "test"),
        (None, 0.9, "validation"),
        (None, 0.0, "validation"),
        (None, None, "test"),
    ],
)
def test_the_split_that_is_shown_is_the_one_that_was_measured(
    test, val, split, monkeypatch, tmp_path
):
    from matplotlib.figure import Figure

    assert measured_on(run(test, val).row()) == split
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: drawn.append(self))
    Comparison((run(test, val),), tmp_path).draw(tmp_path / "a.png", "photos")
    assert drawn[0].axes[0].get_title().startswith(f"{split} accuracy")
