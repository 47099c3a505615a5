"""The benchmark for a GPU goes on where it was ended, row by row; here at small shapes on a CPU."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BEGUN = 3
"""Rows that are there when the benchmark is killed."""
PATIENCE = 240
"""Seconds for what takes less than a minute on a machine of its own."""


@pytest.fixture
def benchmarks(monkeypatch):
    """The modules, under names that others have as well (`common`, `diffusion`), for one test."""
    names = {path.stem for path in BENCHMARKS.glob("*.py")}
    others = {name: sys.modules.pop(name) for name in names & sys.modules.keys()}
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu
    import rows

    yield gpu, rows
    for name in names & sys.modules.keys():
        del sys.modules[name]
    sys.modules.update(others)


def value(folder, name):
    with (folder / "begun").open("a") as log:
        log.write(f"{name}\n")
    # A benchmark may say itself that something in its row could not be measured.
    return {"value": len(name), "not_measured": {}}


def failing(folder, name):
    value(folder, name)
    raise ValueError("no memory is left\nand a page more")


def dying(folder, name):
    value(folder, name)
    os._exit(3)


def slow(folder, name):
    value(folder, name)
    time.sleep(PATIENCE)


def test_each_row_is_measured_once_whatever_becomes_of_the_others(benchmarks, tmp_path, capfd):
    gpu, rows = benchmarks
    # From here: what a server of forks would have to import first, this process has.
    start = "spawn" if os.name == "nt" else "fork"
    parser = gpu.options()
    parser.set_defaults(device="cpu", threads=1, tiny=True, out=tmp_path / "gpu.json")
    kinds = {"first": value, "failing": failing, "dying": dying, "last": value}
    listed = [rows.Row(n, PATIENCE, f, (tmp_path, n)) for n, f in kinds.items()]
    listed.insert(1, rows.Row("slow", 1, slow, (tmp_path, "slow")))
    names = [row.name for row in listed]

    def measure(*options):
        args = parser.parse_args(options)
        args.file = BENCHMARKS / "gpu.py"
        result = rows.measure_missing(args, listed, "a trial", lambda found: [], start)
        assert json.loads(args.out.read_text()) == result
        log = tmp_path / "begun"
        begun = log.read_text().split() if log.exists() else []
        log.unlink(missing_ok=True)
        return result, begun

    result, begun = measure("--minutes", "0")
    assert begun == result["rows"] == [] and result["missing"] == names
    result, begun = measure()
    assert begun == names and result["missing"] == []
    assert [(row["row"], row["value"]) for row in result["rows"]] == [("first", 5), ("last", 4)]
    assert result["not_measured"] == {
        "slow": "took longer than 1 s",
        "failing": "ValueError: no memory is left",
        "dying": "its process ended with 3",
    }
    assert measure() == (result, [])
    again, begun = measure("--again", "last", "failing")
    assert begun == ["failing", "last"]
    assert again["rows"][0] == result["rows"][0] and again["rows"][1] != result["rows"][1]
    with pytest.raises(SystemExit, match="no row second; there are: first, slow"):
        measure("--again", "second")
    with pytest.raises(SystemExit, match="measured otherwise: threads 1, here 2"):
        measure("--threads", "2")
    capfd.readouterr()


def test_the_small_shapes_have_the_rows_of_the_large_ones_and_every_claim_has_a_row(benchmarks):
    gpu, _ = benchmarks

    def listed(tiny):
        return gpu.list_rows(argparse.Namespace(device="cpu", threads=1, tiny=tiny))

    names = [row.name for row in listed(False)]
    assert names == [row.name for row in listed(True)] and len(set(names)) == len(names)
    groups = {name.partition("/")[0] for name in names}
    assert groups == gpu.LARGE.keys() == gpu.TINY.keys()
    told = [claim["measured"] for claim in gpu.claims({})]
    assert told and set(told) == {None}


@pytest.mark.slow
def test_killed_between_two_rows_the_same_command_measures_the_rest(benchmarks, tmp_path):
    gpu, rows = benchmarks
    out = tmp_path / "gpu.json"
    command = [sys.executable, BENCHMARKS / "gpu.py", "--tiny", "--out", out]

    def read():
        return json.loads(out.read_text()) if out.exists() else {"rows": []}

    def start():
        return subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)

    process, end = start(), time.monotonic() + PATIENCE
    while len(read()["rows"]) < BEGUN and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = read()
    assert len(before["rows"]) >= BEGUN and before["missing"]
    # The row that ran then does not go on beside the next call's.
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < end:
            os.killpg(process.pid, 0)
            time.sleep(0.05)
    assert start().wait(PATIENCE) == 0
    after = read()
    assert after["rows"][: len(before["rows"])] == before["rows"] and after["missing"] == []
    names = [row.name for row in gpu.list_rows(argparse.Namespace(device="cpu", threads=1, tiny=1))]
    assert {*after["not_measured"], *(row["row"] for row in after["rows"])} == set(names)
    assert all("No module named" in reason for reason in after["not_measured"].values())
    # What begins to use a GPU when it is imported would keep rows from being forked.
    code = f"import importlib, sys; [*map(importlib.import_module, {rows.IMPORTED})]; sys.exit(any("
    code += "name in sys.modules for name in ('bitsandbytes', 'torchao', 'peft')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
