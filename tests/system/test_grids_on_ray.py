"""Grids and sweeps that Ray's workers make are those of one process, also where a worker is killed."""

import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from restuning._errors import MissingExtraError, StoreError, TrainingError
from restuning._ray import Cluster
from restuning.bench import (
    GridProtocol,
    Job,
    find_tasks,
    list_runs,
    open_grid,
    parse_entries,
    read_results,
    run_grid,
    run_grid_on_ray,
)
from restuning.cli.app import app
from restuning.features import StoreOptions
from restuning.runtime.hub import named_in, naming_file
from restuning.search.on_ray import run_sweep_on_ray
from restuning.search.sweep import SweepRequest, parse_grid, run_sweep
from restuning.task.save_and_load import WEIGHTS
from restuning.training import FitSettings
from restuning.training.run import Source

PATIENCE = 300
SOURCE = str(Path(__file__).parents[2] / "src")
SAME = ("accuracy", "hits", "setting", "chosen", "train_loss", "parameters", "steps", "data")
"""Of a run of a grid: all that is not of the machine and the hour."""
linux = pytest.mark.skipif(not Path("/proc").is_dir(), reason="workers are found in /proc")


def request(stores, data="digits"):
    # Two ranks and two seeds are banks of their own: four that workers may have in hand.
    return SweepRequest(
        Source(data, store=StoreOptions(stores, progress=False)),
        "res-tuning-bypass",
        parse_grid("rank=2,3"),
        range(2),
        FitSettings(epochs=4, batch_size=64),
    )


def job(folder, epochs=4):
    protocol = GridProtocol("restuning-tiny", settings=FitSettings(epochs=epochs))
    runs = list_runs(
        protocol, find_tasks("digits"), parse_entries("linear,res-tuning-bypass"), seeds=2
    )
    open_grid(folder, protocol, runs)
    return Job(protocol, folder, runs)


def test_what_workers_cannot_load_or_see_is_refused_before_ray_is_asked_for(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    asked, out = request(tmp_path / "stores"), tmp_path / "out"
    with pytest.raises(TrainingError, match="takes data by name"):
        run_sweep_on_ray(request(tmp_path, data=object()), out=out)
    with pytest.raises(TrainingError, match="takes a backbone by name"):
        run_sweep_on_ray(replace(asked, backbone=object()), out=out)
    with pytest.raises(TrainingError, match="folder that every node sees"):
        run_sweep_on_ray(asked, out=None)
    with pytest.raises(StoreError, match="not at a URL"):
        run_sweep_on_ray(request("s3://bucket/stores"), out=out)
    with pytest.raises(StoreError, match="not at a URL"):
        run_grid_on_ray(replace(job(tmp_path / "grid"), stores="s3://bucket/stores"))
    for make in (
        lambda: run_sweep_on_ray(asked, out=out),
        lambda: run_grid_on_ray(job(tmp_path / "grid")),
    ):
        with pytest.raises(MissingExtraError, match=r"pip install 'restuning\[ray\]'"):
            make()
    assert not out.exists()
    for line in (
        ["sweep", "digits", "--grid", "rank=2", "--on", "slurm"],
        ["bench", "run", "digits", "--out", str(tmp_path / "g"), "--on", "slurm"],
        ["cache", "digits", "--on", "slurm"],
    ):
        told = CliRunner().invoke(app, line)
        assert told.exit_code == 2 and "takes ray or ray:ADDRESS" in told.output


class InThisProcess:
    """What a cluster is asked of Ray, with one node of two cores."""

    def remote(self, **_how):
        return lambda function: SimpleNamespace(
            options=lambda name: SimpleNamespace(remote=lambda *given: function(*given))
        )

    def nodes(self):
        return [{"Resources": {"CPU": 2.0}}]

    def wait(self, waiting, timeout=None):
        return waiting[:1], waiting[1:]

    def get(self, result):
        return result


def test_workers_know_which_file_names_a_backbone_and_need_no_more_cores_than_a_node_has():
    cluster = Cluster(InThisProcess(), TrainingError, nodes=1, gpus=0, cores=2)
    with named_in("options.yaml"):
        assert list(cluster.run([naming_file] * 2, "ask")) == ["options.yaml"] * 2
    with pytest.raises(TrainingError, match="no node of the Ray cluster has so many cores"):
        list(cluster.run([naming_file], "ask", cores=3))


def kill_one(name, when):
    """A thread that kills a worker that runs a task of that name, as soon as there is a first result; and whom it killed."""
    killed = []

    def watch():
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and not killed:
            if when():
                for each in Path("/proc").glob("[0-9]*/cmdline"):
                    try:
                        if each.read_bytes().startswith(f"ray::{name}".encode()):
                            os.kill(int(each.parent.name), signal.SIGKILL)
                            killed.append(each.parent.name)
                            break
                    except OSError:
                        pass
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread, killed


def figures(folder):
    return {(r["run"], k): r.get(k) for r in read_results(folder) for k in SAME}


def files(folder):
    return sorted(
        str(f.relative_to(folder))
        for f in folder.rglob("*")
        if f.is_file() and "work" not in f.relative_to(folder).parts
    )


@linux
@pytest.mark.slow
def test_two_workers_of_which_one_is_killed_leave_the_sweep_and_the_grid_of_one_process(tmp_path):
    ray = pytest.importorskip("ray")
    one = run_sweep(request(tmp_path / "stores"), out=tmp_path / "sweep")
    assert run_grid(job(tmp_path / "grid")) == 0
    progress, events = [], []
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": SOURCE}})
    try:
        place = tmp_path / "sweep-on-ray"
        thread, killed = kill_one("share_sweep", lambda: list(place.glob("arms/*.json")))
        many = run_sweep_on_ray(
            request(tmp_path / "stores-on-ray"),
            out=place,
            workers=2,
            on_progress=lambda *told: progress.append(told),
        )
        thread.join()
        assert killed

        place = tmp_path / "grid-on-ray"
        thread, killed = kill_one("take_runs", lambda: list(place.glob("runs/*/*/*.json")))
        assert run_grid_on_ray(job(place), workers=2, listen=events.append) == 0
        thread.join()
        assert killed
    finally:
        ray.shutdown()
    for name in ("settings", "best", "final", "average", "arms"):
        assert many.report[name] == one.report[name]
    assert files(tmp_path / "sweep") == files(tmp_path / "sweep-on-ray")
    assert progress[-1][:2] == (2, 2)
    for task in ("seed-0.task", "seed-1.task", "average.task"):
        weights = [
            (tmp_path / name / "final" / task / WEIGHTS).read_bytes()
            for name in ("sweep", "sweep-on-ray")
        ]
        assert weights[0] == weights[1]

    assert figures(tmp_path / "grid") == figures(tmp_path / "grid-on-ray")
    assert files(tmp_path / "grid") == files(tmp_path / "grid-on-ray")
    assert [e.kind for e in events].count("done") == 4
    assert any("2 workers" in e.what for e in events)
    described = [
        json.loads((tmp_path / name / "grid.json").read_text()) for name in ("grid", "grid-on-ray")
    ]
    assert described[0]["protocol"] == described[1]["protocol"]
