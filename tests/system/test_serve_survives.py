"""A server under many clients whose tasks are exchanged all the time: nothing wrong, nothing lost, no growth."""

import json
import random
import runpy
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from restuning import Predictor, serve
from serving import ROUNDING, picture, running, save_tasks

TOKEN = "0123456789abcdef"
IMAGES = 200
FLAT = 60 * 2**20
"""Bytes that memory may rise by after the first third: the allocator's, and not a task's of each exchange."""

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"
MALFORMED, REFUSALS = (runpy.run_path(str(SOAK))[name] for name in ("MALFORMED", "REFUSALS"))


def ask(session, chance, right, found):
    """One question, right or malformed, asked again while the server has too much to do."""
    bad = chance.random() < 0.01
    number = chance.randrange(IMAGES)
    good = {"files": {"images": picture(number)}, "data": {"tasks": "t", "probabilities": "true"}}
    path, question = chance.choice(MALFORMED) if bad else ("/v1/predict", good)
    while (answer := session.post(path, **question)).status_code == 429:
        found["busy"] += 1
        time.sleep(float(answer.headers["retry-after"]))
    if bad:
        found["refused" if answer.status_code in REFUSALS else "wrong"] += 1
        return
    assert answer.status_code == 200, answer.text
    body = answer.json()
    said = body["answers"][0]["tasks"]["t"]
    wanted = right[body["versions"]["t"]][number]
    same = np.allclose(said["probabilities"], wanted, atol=ROUNDING)
    found["right" if same else "wrong"] += 1


@pytest.mark.parametrize(
    ("requests", "exchanges"),
    [
        pytest.param(400, 8, marks=pytest.mark.slow),
        pytest.param(10_000, 200, marks=pytest.mark.longer),
    ],
)
def test_every_answer_under_exchanges_is_the_predictor_s_of_that_version(
    requests, exchanges, tmp_path
):
    tasks = save_tasks(tmp_path, 3, inline=False)
    (tmp_path / "token").write_text(TOKEN)
    application = serve.app(
        {"t": tasks["t0"], "other": tasks["t2"]}, admin_token=tmp_path / "token"
    )
    files = {
        name: {
            "task": (tasks[name] / "task.json").read_bytes(),
            "weights": (tasks[name] / "weights.safetensors").read_bytes(),
        }
        for name in ("t0", "t1")
    }
    headers = {"authorization": f"Bearer {TOKEN}"}
    clients, found, memory = 16, Counter(), []
    with running(application) as address, httpx.Client(base_url=address, timeout=120) as admin:
        right = {}
        for name, given in files.items():
            version = admin.put("/v1/tasks/t", files=given, headers=headers).json()["version"]
            answers = Predictor.load({"t": tasks[name]})([picture(n) for n in range(IMAGES)])
            right[version] = [answer["t"].probabilities.numpy() for answer in answers]
        done = threading.Event()

        def client(number):
            mine, chance = Counter(), random.Random(number)
            with httpx.Client(base_url=address, timeout=120) as session:
                for _ in range(requests // clients):
                    ask(session, chance, right, mine)
            return mine

        def exchange():
            for turn in range(exchanges):
                put = admin.put("/v1/tasks/t", files=files[f"t{turn % 2}"], headers=headers)
                assert put.status_code == 200, put.text
                memory.append(psutil.Process().memory_info().rss)
            done.set()

        with ThreadPoolExecutor(clients + 1) as pool:
            exchanging = pool.submit(exchange)
            for mine in pool.map(client, range(clients)):
                found += mine
            exchanging.result()
    assert not found["wrong"]
    assert found["right"] + found["refused"] == requests // clients * clients
    assert done.is_set()
    assert max(memory[len(memory) // 3 :]) - memory[len(memory) // 3] < FLAT
    assert not application.state.service.batchers[0].held


@pytest.mark.longer
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory as Linux tells it")
def test_a_server_process_under_clients_that_never_rest_is_counted_without_a_fault(tmp_path):
    """Tasks move between forwards, others come and go, and SIGTERM comes while all ask."""
    command = [sys.executable, SOAK, "--minutes", "1", "--exchanges", "40", "--threads", "1"]
    done = subprocess.run(
        [*map(str, command), "--out", str(tmp_path / "soak.json")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "soak.json").read_text())
    (row,) = result["rows"]
    assert [each["what"] for each in result["targets"] if not each["held"]] == [], row
    assert row["found"]["right"] > 500 and row["found"]["malformed, refused"] > 5
    # All three versions answered.
    assert len(row["answers_by_version"]) == 3
