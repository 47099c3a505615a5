"""A choice whose process is killed goes on with the same command, and ends as one that was not."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

PATIENCE = 400
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name == "nt", reason="SIGKILL is of POSIX systems"),
]


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
    command = [sys.executable, "-m", "restuning", "train", str(data), "--method", "auto",
               "--epochs", "2", "--batch-size", "8", "--memory", "24MiB", "--minutes", "30",
               "--out", str(out), "--store", str(store)]  # fmt: skip
    return subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def ended(process):
    told = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, told


def figures(folder):
    choice = json.loads((folder / "choice.json").read_text())
    rows = [{k: row.get(k) for k in ("method", "status", "trials")} for row in choice["rows"]]
    return (
        choice["method"],
        rows,
        json.loads((folder / "metrics.json").read_text())["test_accuracy"],
    )


def test_a_choice_killed_inside_a_trial_goes_on_and_ends_as_one_that_was_not(shades, tmp_path):
    ended(start(shades, tmp_path / "whole", tmp_path / "stores"))
    process = start(shades, tmp_path / "killed", tmp_path / "stores")
    # Written before the trial inside the backbone begins.
    begun, end = tmp_path / "killed/choice/res-tuning.json", time.monotonic() + PATIENCE
    while time.monotonic() < end and not begun.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert json.loads(begun.read_text())["status"] == "begun"
    ended(start(shades, tmp_path / "killed", tmp_path / "stores"))
    assert figures(tmp_path / "killed") == figures(tmp_path / "whole")
