"""A grid that is killed goes on, and two runners share one without doing a run twice."""

import json

from killed import MARKS, ended, kill_when, started

pytestmark = MARKS


def start(out, *more):
    return started(
        "bench",
        "run",
        "digits",
        "--methods",
        "linear,res-tuning-bypass",
        "--seeds",
        3,
        "--epochs",
        2,
        "--set",
        "lr=1e-3,1e-2",
        "--out",
        out,
        *more,
    )


def results(out):
    return {str(p.relative_to(out)): p for p in (out / "runs").rglob("*.json")}


def accuracies(out):
    return {k: json.loads(p.read_text())["accuracy"] for k, p in results(out).items()}


def test_a_killed_grid_goes_on_with_two_runners_and_ends_as_one_that_was_not(tmp_path):
    out = tmp_path / "killed"
    kill_when(start(out), lambda: len(results(out)) >= 2)
    before = {k: p.stat().st_mtime_ns for k, p in results(out).items()}
    assert 2 <= len(before) < 10
    pair = [start(out) for _ in range(2)]
    told = [ended(each) for each in pair]
    made = [sum("%  digits" in line for line in each.splitlines()) for each in told]
    after = {k: p.stat().st_mtime_ns for k, p in results(out).items()}
    assert len(after) == 10 and sum(made) == 10 - len(before)
    assert {k: after[k] for k in before} == before
    ended(start(tmp_path / "whole", "--jobs", "2"))
    assert accuracies(tmp_path / "whole") == accuracies(out)
