"""Replicas of a local Ray answer as a `Predictor`; one is killed under load, and tasks roll, with no answer wrong."""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from restuning import Predictor, load_backbone
from serving import LABELS, ROUNDING, picture, save_task

ray = pytest.importorskip("ray")
serve = pytest.importorskip("ray.serve")
pytestmark = [
    pytest.mark.longer,
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds replicas as Linux lists them"),
]

CLIENTS, QUIET = 4, 1.0
"""Clients of the load, and seconds that all of them are answered again after a replica died."""
PATIENCE = 240
"""Seconds for a replica to start beside all else."""
PORT = 8765


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    yield f"http://127.0.0.1:{PORT}"
    serve.shutdown()
    ray.shutdown()


def told(folders, image):
    """What a `Predictor` says of one image: by task the probability of each label."""
    (answer,) = Predictor.load(folders, device="cpu")([image])
    return {
        name: np.array([{c.label: c.probability for c in said.top(3)}[x] for x in LABELS])
        for name, said in answer.predictions.items()
    }


def ask(address, image, task):
    files = {"images": ("a.png", image)}
    data = {"tasks": task, "top": 3}
    got = httpx.post(f"{address}/v1/predict", data=data, files=files, timeout=60)
    got.raise_for_status()
    (said,) = got.json()["answers"][0]["tasks"].values()
    by_label = {each["label"]: each["probability"] for each in said["top"]}
    return np.array([by_label[x] for x in LABELS])


def test_one_of_two_replicas_is_killed_and_tasks_roll_and_no_answer_is_wrong(cluster, tmp_path):
    from restuning.serve.ray import application

    backbone = load_backbone("restuning-tiny")
    folders = {n: save_task(backbone, tmp_path / f"{n}.task", seed=i) for i, n in enumerate("abc")}
    first = {n: folders[n] for n in "ab"}
    # The same name, another task.
    second = {"a": folders["c"], "b": folders["b"]}
    image = picture()
    allowed = {n: [told({n: f}, image)[n] for f in {first[n], second[n]}] for n in "ab"}
    serve.run(application(first, replicas=2, device="cpu"), name="tasks")
    stop, wrong, lost, last = threading.Event(), [], [], [0.0] * CLIENTS

    def load(number):
        while not stop.is_set():
            name = "ab"[number % 2]
            try:
                found = ask(cluster, image, name)
            except httpx.HTTPError as error:
                lost.append(f"{error} {getattr(getattr(error, 'response', None), 'text', '')}")
                last[number] = time.monotonic()
                continue
            if not any(np.allclose(found, each, atol=ROUNDING) for each in allowed[name]):
                wrong.append(found)

    clients = [threading.Thread(target=load, args=(n,)) for n in range(CLIENTS)]
    for client in clients:
        client.start()
    try:
        time.sleep(2)
        assert not lost, lost[:3]
        victim = next(p for p in replicas() if p != os.getpid())
        before = replicas()
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: len(replicas() - {victim}) == 2 and replicas() != before)
        wait_for(lambda: time.monotonic() - max(last) > QUIET)
        after = len(lost)
        serve.run(application(second, replicas=2, device="cpu"), name="tasks")
        wait_for(
            lambda: np.allclose(ask(cluster, image, "a"), allowed_of(second, image), atol=ROUNDING)
        )
    finally:
        stop.set()
        for client in clients:
            client.join()
    assert not wrong
    # What the dead one was asked at that moment, and nothing while tasks were exchanged.
    assert after <= 2 * CLIENTS, lost
    assert len(lost) == after, lost[after:]


def test_replicas_are_counted_by_hand_or_by_load_and_not_by_both(tmp_path):
    from restuning._errors import TrainingError
    from restuning.serve.ray import application

    folder = save_task(load_backbone("restuning-tiny"), tmp_path / "a.task")
    application(folder, autoscaling={"min_replicas": 1, "max_replicas": 3})
    with pytest.raises(TrainingError, match="the load decides"):
        application(folder, replicas=2, autoscaling={"max_replicas": 3})


def allowed_of(folders, image):
    return told({"a": folders["a"]}, image)["a"]


def replicas():
    """Process numbers of the replicas that run."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        # It may have ended since.
        with contextlib.suppress(OSError):
            if (process / "cmdline").read_bytes().startswith(b"ray::ServeReplica:tasks"):
                found.add(int(process.name))
    return found


def wait_for(true):
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.2)
