"""A server of many tasks against one of one task, bare forwards, and one whole model a task.

    python benchmarks/serve.py

Closed-loop clients (each asks again when it is answered) over loopback, ViT-S/16 at 224 px, fp32, random
weights. Every request is a photograph of its own, so that nothing is known from before. In turns, so that a
busy machine slows all alike: servers of 1, 19 and 64 bypass tasks (of rank 10, with heads of 10 to 100
classes), each asked for all its tasks; a server with one inline task more for each of `--whole`, which is
what N whole models cost; bare forwards of decoded inputs in batches of as many as there are clients.

Beside that, milliseconds to add a task to a running server, to replace one, and to add the hundredth, with
what was done to the backbone for it: no forward, no digest, no second opening (`--rounds 0`: this alone).

Clients are a process of their own, so that their Python is not the server's.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from common import arguments, spread, started, target, write

COUNTS = (1, 19, 64)
NUMBER = 100
"""Of the task whose addition to a running server is timed."""


def build_tasks(folder: Path, name: str, counts: tuple[int, ...], whole: int) -> tuple[Any, Any]:
    """A loaded backbone and its host, with the tasks saved by name."""
    import torch

    import restuning

    torch.manual_seed(0)
    backbone = restuning.load_backbone(name, random=name != "restuning-tiny")
    host = backbone.host()
    tasks = {}
    for number in range(max(counts)):
        task = restuning.methods.build(
            "res-tuning-bypass", host, num_classes=10 + number % 91, zero=False
        )
        tasks[f"task{number}"] = task
    for number in range(whole):
        tasks[f"whole{number}"] = restuning.methods.build("bitfit", host, num_classes=10)
    said = backbone.preprocessing.to_dict()
    return backbone, {
        n: restuning.save(t, host, folder / f"{n}.task", backbone=name, preprocessing=said)
        for n, t in tasks.items()
    }


@contextmanager
def serving(backbone: Any, tasks: dict[str, Path], batch: int) -> Iterator[tuple[str, Any]]:
    """A server of some tasks in this process."""
    import uvicorn

    from restuning import serve
    from restuning.serve.web.run import Server, bind

    service = serve.Service(tasks, backbone=backbone, pace=serve.Pace(batch=batch))
    application = serve.app(service)
    listening = bind("127.0.0.1", 0)
    config = uvicorn.Config(application, log_config=None, access_log=False)
    server = Server(application, config, 10)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    while not application.state.is_ready():
        time.sleep(0.05)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}", service
    service.drain(10)
    server.should_exit = True
    thread.join()


def make_photographs(count: int, first: int) -> list[bytes]:
    """JPEG files of 500 by 375, each another: a few colours that flow into each other, and noise."""
    import io

    import numpy as np
    from PIL import Image

    made = []
    for seed in range(first, first + count):
        chance = np.random.default_rng(seed)
        small = Image.fromarray(chance.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        pixels = np.asarray(small.resize((500, 375), Image.Resampling.BICUBIC)).astype(int)
        pixels = (pixels + chance.integers(-8, 9, pixels.shape)).clip(0, 255).astype(np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "JPEG", quality=90)
        made.append(stream.getvalue())
    return made


def ask(address: str, clients: int, requests: int, first: int) -> dict[str, Any]:
    """Ask as many clients do; in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--asking", address, str(clients), str(requests), str(first)],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def run_clients(address: str, clients: int, requests: int, first: int) -> dict[str, Any]:
    """Requests a second, and for each request the seconds that it took beside forward and decoding."""
    photographs = make_photographs(requests, first)
    each = [photographs[n::clients] for n in range(clients)]
    host = address.removeprefix("http://")

    def client(mine: list[bytes]) -> list[tuple[float, float]]:
        found = []
        # The plainest client there is: what it takes is told as the server's.
        session = http.client.HTTPConnection(host, timeout=600)
        for data in mine:
            start = time.perf_counter()
            session.request("POST", "/v1/predict?top=1", data, {"Content-Type": "image/jpeg"})
            answer = session.getresponse()
            body = answer.read()
            took = time.perf_counter() - start
            assert answer.status == 200, body
            (said,) = json.loads(body)["answers"]
            assert not said["cached"]
            found.append((took, took - said["seconds"]["forward"] - said["seconds"]["decode"]))
        session.close()
        return found

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        rows = [row for found in pool.map(client, each) for row in found]
    seconds = time.perf_counter() - start
    return {
        "requests_per_second": requests / seconds,
        "median_seconds": statistics.median(took for took, _ in rows),
        "median_seconds_beside": statistics.median(beside for _, beside in rows),
    }


def bare(backbone: Any, service: Any, batch: int, inputs: int) -> float:
    """Inputs a second of bare forwards, decoded beforehand."""
    import torch

    model = service.batchers[0].live.predictor.host.model
    x = torch.randn(batch, *backbone.example[0].shape[1:])
    times = []
    with torch.inference_mode():
        model(x)
        for _ in range(max(1, inputs // batch)):
            start = time.perf_counter()
            model(x)
            times.append(time.perf_counter() - start)
    return batch / statistics.median(times)


def main() -> None:
    """Measure and write the JSON."""
    parser = arguments(__doc__, __file__)
    parser.add_argument("--backbone", default="timm:vit_small_patch16_224")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=64, help="of each server and round")
    parser.add_argument("--rounds", type=int, default=5, help="0: loading alone")
    parser.add_argument("--whole", type=int, default=4, help="inline tasks, a forward each")
    parser.add_argument("--asking", nargs=4, help=argparse.SUPPRESS)
    if "--asking" in sys.argv:
        address, *numbers = sys.argv[sys.argv.index("--asking") + 1 :]
        print(json.dumps(run_clients(address, *map(int, numbers))))
        return
    args = started(parser)
    found: dict[str, list[dict[str, Any]]] = {}
    alone: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        backbone, tasks = build_tasks(Path(folder), args.backbone, COUNTS, args.whole)
        served = {f"{n} tasks": {f"task{i}": tasks[f"task{i}"] for i in range(n)} for n in COUNTS}
        served[f"{args.whole} whole models"] = {
            n: folder for n, folder in tasks.items() if n.startswith("whole")
        }
        first = 0
        for number in range(args.rounds):
            order = list(served) if number % 2 == 0 else list(served)[::-1]
            for name in order:
                with serving(backbone, served[name], args.clients) as (address, service):
                    ask(address, args.clients, args.clients, first := first + 10_000)
                    row = ask(address, args.clients, args.requests, first := first + 10_000)
                    counts = service.batchers[0].counts
                    row["mean_batch"] = counts.inputs / sum(counts.batches.values())
                    row["alone"] = ask(address, 1, min(args.requests, 16), first := first + 10_000)
                    found.setdefault(name, []).append(row)
                    if name == "1 tasks":
                        alone.append(bare(backbone, service, args.clients, args.requests))
        with serving(backbone, served["64 tasks"], args.clients) as (_, service):
            loading = time_loading(service, tasks["task0"])
    asked_for = [
        target(f"{what}, to add task number {NUMBER}", count, 0)
        for what, count in loading["asked_for"].items()
    ]
    if not args.rounds:
        what = f"task number {NUMBER} added to a running server, {args.backbone}"
        write(args, what, rows=[loading], targets=asked_for)
        return
    rows = {name: summary(each) for name, each in found.items()}
    one = [row["requests_per_second"] for row in found["1 tasks"]]

    def ratio(name: str) -> float:
        many = [row["requests_per_second"] for row in found[name]]
        return statistics.median(b / a for a, b in zip(one, many, strict=True))

    against = statistics.median(a / b for a, b in zip(one, alone, strict=True))
    targets = [
        target("requests a second, 19 tasks of 1", ratio("19 tasks"), 0.97, at_least=True),
        target("requests a second, 64 tasks of 1", ratio("64 tasks"), 0.95, at_least=True),
        target(
            "milliseconds beside forward and decoding at the median, one client, 1 task",
            1000 * rows["1 tasks"]["alone"]["median_seconds_beside"],
            2,
        ),
        target("inputs a second, 1 task, of bare batched forwards", against, 0.9, at_least=True),
        *asked_for,
    ]
    write(
        args,
        f"servers of many tasks, {args.clients} closed-loop clients, {args.backbone}",
        rows=rows,
        bare_inputs_per_second=alone,
        over_one_task={name: ratio(name) for name in found},
        loading=loading,
        targets=targets,
    )


def time_loading(service: Any, folder: Path) -> dict[str, Any]:
    """Seconds to put one task more beside 64, the same task in its place, and one as number 100; what that asked for."""
    times: dict[str, Any] = {}
    for name in ("added", "added", "replaced"):
        start = time.perf_counter()
        service.put("new" if name == "added" else "task0", folder)
        times[name] = time.perf_counter() - start
    for number in range(NUMBER - 1 - len(service.entries)):
        service.put(f"more{number}", folder)
    service.gather()
    seconds = []
    with counting(service) as counted:
        for _ in range(5):
            start = time.perf_counter()
            service.put("last", folder)
            seconds.append(time.perf_counter() - start)
            assert len(service.entries) == NUMBER
            service.remove("last")
            service.gather()
    return {**times, f"added as number {NUMBER}": spread(seconds), "asked_for": counted}


@contextmanager
def counting(service: Any) -> Iterator[dict[str, int]]:
    """What is done with the backbone meanwhile: forwards, digests of its weights, and other openings."""
    from restuning.serve import service as module

    host, before = service.batchers[0].live.predictor.host, service.batchers[0].counts.forwards
    counted = {"forwards": 0, "digests of the backbone": 0, "backbones opened": 0}

    def count(what: str, real: Any) -> Any:
        def called(*args: Any, **how: Any) -> Any:
            counted[what] += 1
            return real(*args, **how)

        return called

    kind, load = type(host), module.Predictor.load
    with (
        mock.patch.object(kind, "identity", count("digests of the backbone", kind.identity)),
        mock.patch.object(module.Predictor, "load", count("backbones opened", load)),
    ):
        hook = host.model.register_forward_pre_hook(
            lambda *_: counted.update(forwards=counted["forwards"] + 1)
        )
        yield counted
        hook.remove()
    assert service.batchers[0].counts.forwards - before == counted["forwards"]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds."""
    made: dict[str, Any] = {}
    for name, value in rows[0].items():
        each = [row[name] for row in rows]
        made[name] = summary(each) if isinstance(value, dict) else statistics.median(each)
    return made


if __name__ == "__main__":
    main()
