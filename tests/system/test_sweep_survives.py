"""A sweep that is killed goes on with the arms it has not finished, and ends the same."""

import json

from killed import MARKS, ended, kill_when, started

GRID = "lr=1e-3,5e-3,rank=2,3"
"""Two ranks are two banks: one is finished before the other begins."""
pytestmark = MARKS


def start(out, store):
    return started(
        "sweep",
        "digits",
        "--grid",
        GRID,
        "--seeds",
        1,
        "--epochs",
        6,
        "--out",
        out,
        "--store",
        store,
    )


def test_a_killed_sweep_goes_on_and_ends_as_one_that_was_not(tmp_path):
    ended(start(tmp_path / "whole", tmp_path / "stores"))
    arms = tmp_path / "killed/arms"
    process = start(tmp_path / "killed", tmp_path / "stores")
    kill_when(process, lambda: len(list(arms.glob("*.json"))) >= 2)
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
