"""A sweep that is killed goes on with the arms it has not finished, and ends the same."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

PATIENCE = 300
GRID = "lr=1e-3,5e-3,rank=2,3"
"""Two ranks are two banks: one is finished before the other begins."""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name == "nt", reason="SIGKILL is of POSIX systems"),
]


def start(out, store, epochs="6"):
    command = [sys.executable, "-m", "restuning", "sweep", "digits", "--grid", GRID, "--seeds", "1",
               "--epochs", epochs, "--out", str(out), "--store", str(store)]  # fmt: skip
    return subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def ended(process):
    told = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, told


def test_a_killed_sweep_goes_on_and_ends_as_one_that_was_not(tmp_path):
    ended(start(tmp_path / "whole", tmp_path / "stores"))
    process = start(tmp_path / "killed", tmp_path / "stores")
    arms, end = tmp_path / "killed/arms", time.monotonic() + PATIENCE
    while time.monotonic() < end and len(list(arms.glob("*.json"))) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = {p.name: p.stat().st_mtime_ns for p in arms.glob("*.json")}
    assert 0 < len(before) < 4
    ended(start(tmp_path / "killed", tmp_path / "stores"))
    after = {p.name: p.stat().st_mtime_ns for p in arms.glob("*.json")}
    assert {name: after[name] for name in before} == before
    whole, killed = (
        json.loads((tmp_path / name / "sweep.json").read_text()) for name in ("whole", "killed")
    )
    assert killed["settings"] == whole["settings"]
    assert killed["final"] == whole["final"]
