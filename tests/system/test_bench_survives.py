"""A grid that is killed goes on, and two runners share one without doing a run twice."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

PATIENCE = 300
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name == "nt", reason="SIGKILL is of POSIX systems"),
]


def start(out, *more):
    command = [sys.executable, "-m", "restuning", "bench", "run", "digits", "--methods",
               "linear,res-tuning-bypass", "--seeds", "3", "--epochs", "2", "--set",
               "lr=1e-3,1e-2", "--out", str(out), *more]  # fmt: skip
    return subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def ended(process):
    told = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, told
    return told


def results(out):
    return {str(p.relative_to(out)): p for p in (out / "runs").rglob("*.json")}


def accuracies(out):
    return {k: json.loads(p.read_text())["accuracy"] for k, p in results(out).items()}


def test_a_killed_grid_goes_on_with_two_runners_and_ends_as_one_that_was_not(tmp_path):
    process = start(tmp_path / "killed")
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and len(results(tmp_path / "killed")) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = {k: p.stat().st_mtime_ns for k, p in results(tmp_path / "killed").items()}
    assert 2 <= len(before) < 10
    pair = [start(tmp_path / "killed") for _ in range(2)]
    told = [ended(each) for each in pair]
    made = [sum("%  digits" in line for line in each.splitlines()) for each in told]
    after = {k: p.stat().st_mtime_ns for k, p in results(tmp_path / "killed").items()}
    assert len(after) == 10 and sum(made) == 10 - len(before)
    assert {k: after[k] for k in before} == before
    whole = start(tmp_path / "whole", "--jobs", "2")
    ended(whole)
    assert accuracies(tmp_path / "whole") == accuracies(tmp_path / "killed")
