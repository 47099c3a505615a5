"""`restuning serve` as a process: it answers, and ends without losing an answer."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from commands import restuning
from restuning import Predictor
from serving import picture, save_tasks, wait_until_ready

PATIENCE = 120


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return save_tasks(tmp_path_factory.mktemp("tasks"), 2, inline=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--watch DIR"),
        (["TASK", "--admin-token", "none.txt"], "the file of the admin token cannot be read"),
        (["none.task"], "no task here"),
        (["--watch", "none"], "no folder to watch"),
        (["TASK", "--host", "203.0.113.7"], "cannot be bound"),
    ],
    ids=str,
)
def test_what_cannot_be_served_ends_in_a_sentence(tasks, arguments, words):
    named = [tasks["t0"] if each == "TASK" else each for each in arguments]
    done = restuning("serve", "--port", 0, *named)
    assert done.returncode != 0
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_terminated_server_answers_or_refuses_everybody_who_asked(tasks, tmp_path):
    command = [sys.executable, "-m", "restuning", "serve", str(tasks["t0"]), "--port", "0"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    # A line of the log for each request goes to a file: a pipe that nobody reads holds about 300
    # lines, and the server would then wait in its next line for ever.
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )
    try:
        address = server.stdout.readline().split()[-1]
        wait_until_ready(address, PATIENCE)
        right = Predictor.load({"t0": tasks["t0"]})

        def client(number):
            found = Counter()
            with httpx.Client(base_url=address, timeout=PATIENCE) as session:
                for turn in range(100_000):
                    image = picture(10 * number + turn % 10)
                    answer = session.post("/v1/predict", files={"images": image})
                    found[answer.status_code] += 1
                    if answer.status_code == 200 and turn < 10:
                        said = answer.json()["answers"][0]["tasks"]["t0"]["label"]
                        found["right"] += said == right(image)[0].label
                        found["checked"] += 1
                    elif answer.status_code == 503:
                        assert int(answer.headers["retry-after"]) >= 1
                        break
            return found

        with ThreadPoolExecutor(4) as pool:
            clients = [pool.submit(client, number) for number in range(4)]
            time.sleep(1.5)
            server.send_signal(signal.SIGTERM)
            ended = [future.result(PATIENCE) for future in clients]
        found = sum(ended, Counter())
        assert server.wait(PATIENCE) == 0
        # Nothing but answers and refusals: whoever was hung up on would have raised.
        assert set(found) == {200, 503, "right", "checked"}
        assert found[503] == 4 and found["right"] == found["checked"] >= 4
    finally:
        server.kill()
        server.communicate()
