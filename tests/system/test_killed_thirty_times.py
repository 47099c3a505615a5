"""Commands that are killed at moments drawn by a seed, again and again, end as if nothing had happened."""

import json
import random
import signal
import time

import numpy as np
import pytest
from killed import MARKS, PATIENCE, ended, started, try_to_kill
from PIL import Image
from safetensors.numpy import load_file

from commands import restuning

KILLS, TRIES = 30, 10
CLOCKS = {"seconds", "peak_memory_bytes", "forecast", "built_seconds", "choice"}
"""What is measured of a run, and differs from one to the next; `choice` has times inside."""

SLOW, POSIX = MARKS
pytestmark = POSIX


@pytest.fixture(scope="module")
def shades(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("data") / "shades", np.random.default_rng(0)
    for number in range(60):
        name = "light" if number % 2 else "dark"
        (folder / name).mkdir(parents=True, exist_ok=True)
        low = 20 * (number % 2)
        pixels = rng.integers(low, low + 230, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name / f"{number:02}.png")
    return folder


def train(method, *more):
    def command(data, folder):
        return [
            *("train", data, "--method", method, "--batch-size", 8, "--checkpoint-every", 1),
            *("--out", folder / "run", "--store", folder / "stores", *more),
        ]

    return command


def cache(data, folder):
    return ["cache", data, "--batch-size", 1, "--tokens", "all", "--store", folder / "stores"]


COMMANDS = {
    "live inline": train("res-tuning", "--epochs", 4, "--ema", 0.9, "--augment", "flip"),
    "auto": train("auto", "--epochs", 2, "--memory", "24MiB"),
    "ridge": train("ridge", "--epochs", 6),
    "cache": cache,
}


def without_clocks(value):
    if isinstance(value, dict):
        return {k: without_clocks(v) for k, v in value.items() if k not in CLOCKS}
    return value


def end_of(folder):
    """All that a command left but what clocks say: weights, figures, logs, and the names of files."""
    found = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(file.relative_to(folder))
        found[name] = ""
        if file.name in ("weights.safetensors", "final.safetensors"):
            tensors = load_file(file)
            found[name] = {n: (t.dtype.str, t.shape, t.tobytes()) for n, t in tensors.items()}
        elif file.name == "metrics.json":
            metrics = without_clocks(json.loads(file.read_text()))
            # Where the store lies.
            found[name] = {k: v for k, v in metrics.items() if k != "features"}
        elif file.name == "log.jsonl":
            found[name] = [without_clocks(json.loads(line)) for line in file.open()]
        elif file.name == "manifest.json":
            found[name] = json.loads(file.read_text())["shards"]
    return found


def timed(command):
    before = time.monotonic()
    ended(started(*command))
    return time.monotonic() - before


def test_a_run_that_is_solved_and_killed_once_ends_as_one_that_was_not(shades, tmp_path):
    ridge = train("ridge", "--epochs", 2)
    assert restuning(*ridge(shades, tmp_path / "whole")).returncode == 0
    # It ends soon after: on a busy machine before anybody has looked.
    for number in range(TRIES):
        folder = tmp_path / f"killed {number}"
        killed, _ = try_to_kill(
            started(*ridge(shades, folder)), (folder / "run/checkpoints").exists
        )
        if killed:
            break
    else:
        pytest.fail(f"it ended before it was killed, {TRIES} times")
    assert restuning(*ridge(shades, folder)).returncode == 0
    assert end_of(folder) == end_of(tmp_path / "whole")


@SLOW
@pytest.mark.parametrize(
    "kind",
    # Two minutes by itself; the choice trains inside the backbone and is killed as well.
    [pytest.param(k, marks=pytest.mark.longer if k == "live inline" else ()) for k in COMMANDS],
)
def test_thirty_kills_leave_no_trace_in_the_end(kind, shades, tmp_path):
    command = COMMANDS[kind]
    whole = timed(command(shades, tmp_path / "whole"))
    # Once it is finished, what is left is to start and to see that.
    begin = timed(command(shades, tmp_path / "whole"))
    wanted = end_of(tmp_path / "whole")
    draw, kills, folders = random.Random(kind), 0, 0
    while kills < KILLS:
        folder, folders = tmp_path / f"killed {folders}", folders + 1
        while True:
            # While it starts, or so far into what is left that all takes many starts.
            late = begin * 0.7 + draw.uniform(0, (whole - begin) / 6)
            moment = draw.uniform(0, begin) if draw.random() < 0.3 else late
            process = started(*command(shades, folder))
            end = time.monotonic() + (moment if kills < KILLS else PATIENCE)
            while time.monotonic() < end and process.poll() is None:
                time.sleep(0.005)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            told = "".join(process.communicate(PATIENCE))
            assert process.returncode in (0, -signal.SIGKILL), told
            if process.returncode == 0:
                break
            kills += 1
        assert end_of(folder) == wanted
    assert kills >= KILLS
