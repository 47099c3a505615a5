"""A server under clients that never rest, whose tasks are exchanged all the time: counted, not timed.

    python benchmarks/soak.py --minutes 10

`restuning serve` as a process, with the embedded backbone and three tasks, of which one prepares its images
in another way and so has a forward of its own. Sixteen closed-loop clients (each asks again when it is
answered) over loopback, in a process of their own, ask about images drawn from a few hundred, of which the
server's cache holds a part: one task, all of them, or over the Open Inference Protocol; one request of a
hundred is malformed. Meanwhile a task is exchanged, by turns for one of its kind and for one that is prepared
otherwise, and others come and go.

Every answer is compared with the `Predictor`'s of the version that it tells. At the end the server is told
to end (SIGTERM) while all of them ask: each must be answered, or refused in words.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np

IMAGES = 400
CLIENTS = 16
MALFORMED_SHARE = 0.01
TOKEN = "of-a-server-that-ends-with-this-run"
PATIENCE = 60.0
"""Seconds after which a request hangs: twice what the server gives itself."""
ROUNDING = 1e-5
"""A product of another number of rows sums in another order."""
FLAT_MIB = 16
"""That memory may rise by over the last two thirds, by its slope: the allocator's, and not 4 KiB a request."""


def make_picture(seed: int) -> bytes:
    """A small PNG of noise."""
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


JSON = {"content-type": "application/json"}

MALFORMED: list[tuple[str, dict[str, Any]]] = [
    ("/v1/predict", {"content": b"{", "headers": JSON}),
    ("/v1/predict", {"content": b"[" * 5000, "headers": JSON}),
    ("/v1/predict", {"content": b'{"texts": "\\ud800"}', "headers": JSON}),
    ("/v1/predict", {"json": {"images": "no base64"}}),
    ("/v1/predict", {"json": {"images": "http://127.0.0.1/a.png"}}),
    ("/v1/predict", {"json": {}}),
    ("/v1/predict", {"files": {"images": make_picture(0)[:300]}}),
    ("/v1/predict", {"files": {"images": make_picture(0)}, "data": {"tasks": "dogs"}}),
    ("/v1/predict", {"files": {"images": make_picture(0)}, "data": {"top": "-1"}}),
    ("/v1/predict", {"files": {"photo": make_picture(0)}}),
    ("/v1/predict", {"content": os.urandom(100), "headers": {"content-type": "image/png"}}),
    ("/v1/predict", {"content": b"a", "headers": {"content-type": "text/plain"}}),
    ("/t/classify", {"json": {"inputs": "no base64"}}),
    ("/dogs/classify", {"json": {"inputs": "a"}}),
    ("/v1/embeddings", {"json": {"input": []}}),
    ("/v2/models/t/infer", {"content": b"[]"}),
    ("/v2/models/t/infer", {"json": {"inputs": [{"name": "image", "shape": [2**40]}]}}),
    ("/v1/tasks/t", {"content": b""}),
]
"""Paths and bodies of requests that must be refused, of every protocol."""

REFUSALS = range(400, 500)


class Client:
    """One who asks again as soon as it is answered, until the server ends.

    Args:
        address: Of the server.
        number: Its own; seeds what it asks.
        right: Probabilities by version and image.
        pictures: What is asked about.
    """

    def __init__(
        self, address: str, number: int, right: dict[str, Any], pictures: list[bytes]
    ) -> None:
        self.right, self.pictures = right, pictures
        self.chance = random.Random(number)
        self.found: Counter[str] = Counter()
        self.notes: list[str] = []
        self.seconds: list[float] = []
        self.session = httpx.Client(base_url=address, timeout=PATIENCE)

    def run(self, until: float) -> None:
        """Ask until the server says that it ends, or until a clock that it should have ended by."""
        with self.session:
            while time.monotonic() < until:
                if self.chance.random() < MALFORMED_SHARE:
                    ended = self._ask_malformed()
                elif self.chance.random() < 0.1:
                    ended = self._ask_open_inference()
                else:
                    ended = self._ask_own()
                if ended:
                    return
        self.found["never ended"] += 1

    def _post(self, path: str, **body: Any) -> httpx.Response | None:
        """An answer; None where the server ends, or gave none."""
        while True:
            start = time.monotonic()
            try:
                answer = self.session.post(path, **body)
            except httpx.ConnectError:
                # Nothing was asked: the door was closed between two questions.
                self.found["door closed"] += 1
                return None
            except httpx.TimeoutException:
                self._count("hung", path)
                return None
            except httpx.TransportError as error:
                self._count("lost", f"{path}: {error!r}")
                return None
            self.seconds.append(time.monotonic() - start)
            if answer.status_code == 503 and "about to end" in answer.text:
                self.found["refused at the end"] += 1
                return None
            if answer.status_code != 429:
                return answer
            self.found["asked to come again"] += 1
            time.sleep(float(answer.headers["retry-after"]))

    def _count(self, what: str, note: str) -> None:
        self.found[what] += 1
        self.notes = [*self.notes, f"{what}: {note}"[:300]][:5]

    def _ask_malformed(self) -> bool:
        path, body = self.chance.choice(MALFORMED)
        if (answer := self._post(path, **body)) is None:
            return True
        refused = answer.status_code in REFUSALS and "error" in answer.text
        if refused:
            self.found["malformed, refused"] += 1
        else:
            self._count("malformed, not refused", f"{path} {answer.status_code} {answer.text}")
        return False

    def _ask_own(self) -> bool:
        number = self.chance.randrange(len(self.pictures))
        tasks = self.chance.choice(("t", "t", "t,other,apart"))
        files, data = {"images": self.pictures[number]}, {"tasks": tasks, "probabilities": "true"}
        if (answer := self._post("/v1/predict", files=files, data=data)) is None:
            return True
        said = answer.json() if answer.status_code == 200 else {}
        told = said["answers"][0]["tasks"] if said else {}
        self._compare(
            number,
            {n: (said["versions"][n], told[n]["probabilities"]) for n in told},
            tasks.split(","),
            answer,
        )
        return False

    def _ask_open_inference(self) -> bool:
        number = self.chance.randrange(len(self.pictures))
        data = [base64.b64encode(self.pictures[number]).decode()]
        given = {"name": "image", "datatype": "BYTES", "shape": [1], "data": data}
        if (answer := self._post("/v2/models/t/infer", json={"inputs": [given]})) is None:
            return True
        said = answer.json() if answer.status_code == 200 else {}
        outputs = {o["name"]: o["data"] for o in said.get("outputs", ())}
        told = {"t": (said["model_version"], outputs["probabilities"])} if said else {}
        self._compare(number, told, ["t"], answer)
        return False

    def _compare(
        self, number: int, told: dict[str, Any], tasks: list[str], answer: httpx.Response
    ) -> None:
        right = {*told} == {*tasks} and all(
            version in self.right
            and np.allclose(chances, self.right[version][number], atol=ROUNDING)
            for version, chances in told.values()
        )
        if right:
            self.found["right"] += 1
            self.found[f"version {told['t'][0]}"] += 1
        else:
            self._count("wrong", f"image {number} {answer.status_code} {answer.text}")


def run_clients(address: str, answers: str, seconds: float) -> None:
    """All clients, in a process of their own; prints what they found as JSON."""
    with np.load(answers) as file:
        right = {version: file[version] for version in file.files}
    pictures = [make_picture(seed) for seed in range(IMAGES)]
    clients = [Client(address, n, right, pictures) for n in range(CLIENTS)]
    until = time.monotonic() + seconds
    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(lambda client: client.run(until), clients))
    found: Counter[str] = sum((client.found for client in clients), Counter())
    took = np.concatenate([client.seconds for client in clients])
    notes = [note for client in clients for note in client.notes]
    times = {"p50": np.median(took), "p99": np.quantile(took, 0.99), "largest": took.max()}
    told = {n: float(v) for n, v in times.items()}
    print(json.dumps({"found": found, "notes": notes[:8], "requests": len(took), "seconds": told}))


def build_tasks(folder: Path) -> dict[str, Path]:
    """`t`, the two it is exchanged for, and what stands beside it."""
    import torch

    import restuning

    backbone = restuning.load_backbone("restuning-tiny")
    assert backbone.preprocessing is not None
    host, said = backbone.host(), backbone.preprocessing.to_dict()
    made = {}
    for seed, name in enumerate(("t", "same", "otherwise", "other", "apart")):
        torch.manual_seed(seed)
        task = restuning.methods.build("res-tuning-bypass", host, num_classes=3)
        torch.nn.init.normal_(task.head.weight)
        task.labels = ["ant", "bee", "cat"]
        how = said | ({"mean": [0.1, 0.2, 0.3]} if name in ("otherwise", "apart") else {})
        made[name] = restuning.save(
            task, host, folder / f"{name}.task", backbone="restuning-tiny", preprocessing=how
        )
    return made


def answer_all(tasks: dict[str, Path], pictures: list[bytes]) -> dict[str, Any]:
    """What the predictor says, by task."""
    import restuning

    return {
        name: np.stack(
            [
                a[name].probabilities.numpy()
                for a in restuning.Predictor.load({name: file})(pictures)
            ]
        )
        for name, file in tasks.items()
    }


@contextlib.contextmanager
def serving(tasks: list[Path], token: Path, threads: int) -> Iterator[tuple[subprocess.Popen, str]]:
    """`restuning serve` as a process, and its address."""
    command = [sys.executable, "-m", "restuning", "serve", *map(str, tasks), "--port", "0"]
    command += ["--admin-token", str(token), "--quiet", "--cache", "1"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().split()[-1]
            end = time.monotonic() + PATIENCE
            while httpx.get(f"{address}/readyz").status_code != 200 and time.monotonic() < end:
                time.sleep(0.1)
            yield server, address
        finally:
            server.kill()


class Exchanges:
    """Tasks that are put in and taken out while all others are asked.

    Args:
        address: Of the server.
        files: Bodies of `PUT`, by task.
    """

    def __init__(self, address: str, files: dict[str, Any]) -> None:
        self.files = files
        self.done, self.refused = 0, Counter[str]()
        headers = {"authorization": f"Bearer {TOKEN}"}
        self.session = httpx.Client(base_url=address, timeout=PATIENCE, headers=headers)

    def run(self, count: int, seconds: float) -> None:
        """Exchange `t`, evenly over some seconds; another task comes or goes with each fifth exchange."""
        start = time.monotonic()
        for turn in range(count):
            time.sleep(max(0.0, start + turn * seconds / count - time.monotonic()))
            name = ("same", "otherwise", "t")[turn % 3]
            self.done += self._did(self.session.put("/v1/tasks/t", files=self.files[name]))
            if turn % 10 == 0:
                self._did(self.session.put("/v1/tasks/guest", files=self.files["same"]))
            if turn % 10 == 5:
                self._did(self.session.delete("/v1/tasks/guest"))
        self.session.close()

    def _did(self, answer: httpx.Response) -> bool:
        if not answer.is_success:
            self.refused[f"{answer.status_code} {answer.text[:200]}"] += 1
        return answer.is_success


def read_memory(process: int) -> float:
    """MiB that a process holds now (Linux)."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def describe_memory(samples: list[tuple[float, float]]) -> dict[str, float]:
    """Memory over time, and its slope over the last two thirds."""
    seconds, held = map(np.array, zip(*samples, strict=True))
    late = seconds >= seconds[0] + (seconds[-1] - seconds[0]) / 3
    slope = float(np.polyfit(seconds[late], held[late], 1)[0])
    return {
        "samples": len(samples),
        "mib_first": float(held[0]),
        "mib_after_a_third": float(held[late][0]),
        "mib_last": float(held[-1]),
        "mib_a_minute": 60 * slope,
        "mib_by_slope": slope * float(np.ptp(seconds[late])),
    }


def soak(folder: Path, minutes: float, exchanges: int, threads: int) -> dict[str, Any]:
    """Run it once; everything that was counted."""
    tasks = build_tasks(folder)
    pictures = [make_picture(seed) for seed in range(IMAGES)]
    said = answer_all(tasks, pictures)
    token = folder / "token.txt"
    token.write_text(TOKEN)
    files = {
        name: {
            "task": (task / "task.json").read_bytes(),
            "weights": (task / "weights.safetensors").read_bytes(),
        }
        for name, task in tasks.items()
    }
    served = [tasks[name] for name in ("t", "other", "apart")]
    seconds, samples = 60 * minutes, []
    with serving(served, token, threads) as (server, address):
        exchange = Exchanges(address, files)
        right = {}
        for name in ("same", "otherwise", "t"):
            put = exchange.session.put("/v1/tasks/t", files=files[name]).json()
            right[put["version"]] = said[name]
        for each in httpx.get(f"{address}/v1/tasks").json()["tasks"]:
            right[each["version"]] = said[each["name"]]
        np.savez(folder / "right.npz", **right)
        command = [sys.executable, __file__, "--asking", address, str(folder / "right.npz")]
        start = time.monotonic()
        with subprocess.Popen(
            [*command, str(seconds + 2 * PATIENCE)], stdout=subprocess.PIPE, text=True
        ) as clients:
            turning = threading.Thread(target=exchange.run, args=(exchanges, seconds))
            turning.start()
            while time.monotonic() < start + seconds:
                samples.append((time.monotonic() - start, read_memory(server.pid)))
                time.sleep(min(1.0, seconds / 60))
            turning.join()
            counted = httpx.get(f"{address}/metrics").text
            server.send_signal(signal.SIGTERM)
            told, _ = clients.communicate()
            try:
                status = server.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                status = -1
    asked = json.loads(told.splitlines()[-1])
    found = asked.pop("found")
    versions = {name[8:20]: n for name, n in found.items() if name.startswith("version ")}
    found = {name: n for name, n in found.items() if not name.startswith("version ")}
    return {
        "seconds": time.monotonic() - start,
        "requests": asked["requests"],
        "found": found,
        "notes_of_clients": asked["notes"],
        "request_seconds": asked["seconds"],
        "answers_by_version": versions,
        "exchanges": exchange.done,
        "exchanges_refused": dict(exchange.refused),
        "server": _read_counts(counted),
        "memory": describe_memory(samples),
        "status": status,
    }


def _read_counts(text: str) -> dict[str, float]:
    """What the server itself counted, over all its backbones."""
    found: Counter[str] = Counter()
    for name in ("inputs", "forwards", "cache_hits", "failed", "refused", "expired", "no_number"):
        for line in text.splitlines():
            if line.startswith(f"restuning_{name}_total"):
                found[name] += float(line.split()[-1])
    return dict(found)


def main() -> None:
    """Measure and write the JSON."""
    if "--asking" in sys.argv:
        address, answers, seconds = sys.argv[sys.argv.index("--asking") + 1 :]
        run_clients(address, answers, float(seconds))
        return
    # Not at the top: the tests take what is asked from here, and have no `common`. And not at the end: what
    # writes the result would be another state of the code where that was changed in these ten minutes.
    from common import arguments, started, target, write

    from restuning.bench.measure import read_versions  # noqa: F401

    parser: argparse.ArgumentParser = arguments(__doc__ or "", __file__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--exchanges", type=int, default=200)
    args = started(parser)
    with tempfile.TemporaryDirectory() as folder:
        row = soak(Path(folder), args.minutes, args.exchanges, args.threads)
    found = row["found"]
    ended = found.get("refused at the end", 0) + found.get("door closed", 0)
    targets = [
        target("answers that are not the predictor's of their version", found.get("wrong", 0), 0),
        target("requests that got no answer", found.get("lost", 0), 0),
        target(f"requests that took over {PATIENCE:.0f} s", found.get("hung", 0), 0),
        target(
            "malformed requests that were not refused", found.get("malformed, not refused", 0), 0
        ),
        target("exchanges under load", row["exchanges"], args.exchanges, at_least=True),
        target("clients that were refused in words after SIGTERM", ended, CLIENTS, at_least=True),
        target("exit status after SIGTERM", row["status"], 0),
        target(
            "MiB that memory rose by over the last two thirds, by its slope",
            row["memory"]["mib_by_slope"],
            FLAT_MIB,
        ),
    ]
    what = (
        f"a server under {CLIENTS} closed-loop clients for {args.minutes:g} minutes, restuning-tiny"
    )
    note = "Requests, answers and memory are what is counted here; seconds hang on what else the machine does."
    write(args, what, rows=[row], targets=targets, notes=[note])


if __name__ == "__main__":
    main()
