"""A choice whose process is killed goes on with the same command, and ends as one that was not."""

import json

import numpy as np
import pytest
from killed import MARKS, ended, kill_when, started
from PIL import Image

pytestmark = MARKS


@pytest.fixture
def shades(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(48):
        folder = tmp_path / "shades" / ("light" if number % 2 else "dark")
        folder.mkdir(parents=True, exist_ok=True)
        low = 60 * (number % 2)
        pixels = rng.integers(low, low + 190, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return tmp_path / "shades"


def start(data, out, store):
    return started(
        "train",
        data,
        "--method",
        "auto",
        "--epochs",
        2,
        "--batch-size",
        8,
        "--memory",
        "24MiB",
        "--minutes",
        30,
        "--out",
        out,
        "--store",
        store,
    )


def figures(folder):
    choice = json.loads((folder / "choice.json").read_text())
    rows = [{k: row.get(k) for k in ("method", "status", "trials")} for row in choice["rows"]]
    return (
        choice["method"],
        rows,
        json.loads((folder / "metrics.json").read_text())["test_accuracy"],
    )


def test_a_choice_killed_in_a_trial_and_in_the_final_run_ends_as_one_that_was_not(shades, tmp_path):
    ended(start(shades, tmp_path / "whole", tmp_path / "stores"))
    out = tmp_path / "killed"
    # Written before the trial inside the backbone begins.
    begun = out / "choice/res-tuning.json"
    kill_when(start(shades, out, tmp_path / "stores"), begun.exists)
    assert json.loads(begun.read_text())["status"] == "begun"
    # The final run keeps its checkpoints in the folder itself.
    kill_when(start(shades, out, tmp_path / "stores"), (out / "checkpoints").exists)
    assert not (out / "metrics.json").exists()
    ended(start(shades, out, tmp_path / "stores"))
    assert figures(out) == figures(tmp_path / "whole")
