"""A choice whose process is killed goes on with the same command, and ends as one that was not."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

PATIENCE = 400
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name == "nt", reason="SIGKILL is of POSIX systems"),
]


def start(out, store):
    command = [sys.executable, "-m", "restuning", "train", "digits", "--method", "auto", "--epochs",
               "2", "--memory", "20MiB", "--minutes", "30", "--out", str(out), "--store", str(store)]  # fmt: skip
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


def test_a_killed_choice_goes_on_and_ends_as_one_that_was_not(tmp_path):
    ended(start(tmp_path / "whole", tmp_path / "stores"))
    process = start(tmp_path / "killed", tmp_path / "stores")
    first, end = tmp_path / "killed/choice/linear.json", time.monotonic() + PATIENCE
    while time.monotonic() < end and not first.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed/metrics.json").exists()
    ended(start(tmp_path / "killed", tmp_path / "stores"))
    assert figures(tmp_path / "killed") == figures(tmp_path / "whole")
