"""A grid carried out by several processes, here or elsewhere, until every run has its result."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from restuning._errors import FormatError, RestuningError, TrainingError
from restuning.bench.bench import Bench
from restuning.bench.facts import head, result_file
from restuning.bench.grid import Protocol, Run, searches
from restuning.bench.measure import versions
from restuning.bench.record import FORMAT, GRID, WORK, read_json, read_result, write_json
from restuning.features.claim import Claim
from restuning.train import FitSettings

POLL = 0.5
"""Seconds between two looks at what other processes have done."""


@dataclass(frozen=True)
class Event:
    """What a worker tells: `kind` "start", "done", "failed" or "end"."""

    worker: int
    kind: str
    what: str
    accuracy: float | None = None
    split: str = ""


Listener = Callable[[Event], None]


@dataclass(frozen=True)
class Job:
    """What a worker process is given.

    Attributes:
        protocol, folder, stores, keep: Of the `Bench`.
        runs: All runs of the grid, in order.
        threads: Of torch, for this process.
    """

    protocol: Protocol
    folder: Path
    runs: list[Run]
    stores: Path | None = None
    keep: bool = False
    threads: int = 1


def open_grid(
    folder: Path, protocol: Protocol, runs: Sequence[Run], retry: bool = False
) -> list[Run]:
    """Begin a grid or go on with one; the runs that have no result.

    Args:
        folder: Of the grid.
        protocol: Must be the one the folder was begun with.
        runs: Wanted; more tasks, entries and seeds may be added to a folder at any time.
        retry: Forget failures, so that those runs are made again.

    Raises:
        TrainingError: The folder was begun with another protocol.
        FormatError: A result that is there is malformed.
    """
    identity = json.loads(json.dumps(protocol.identity()))
    choices = {r.entry.label: _choices(protocol, r) for r in runs}
    file = folder / GRID
    (folder / WORK).mkdir(parents=True, exist_ok=True)
    (folder / WORK / ".gitignore").write_text("*\n", encoding="utf-8")
    claim = Claim.take(folder / WORK / "grid.lock", wait=True)
    try:
        known: dict[str, Any] = {}
        if file.exists():
            before = read_json(file)
            _check_same(before, identity, folder)
            known = before.get("choices", {})
            other = [k for k, v in choices.items() if k in known and known[k] != v]
            if other:
                raise TrainingError(
                    "this grid chooses between other settings", where=str(folder),
                    found="; ".join(f"{k}: {known[k]} then, {choices[k]} now" for k in other),
                    fix="use those of then, another label (LABEL=METHOD), or another --out",
                )  # fmt: skip
        write_json(file, {"format": FORMAT, "protocol": identity, "choices": {**known, **choices},
                          "versions": versions()})  # fmt: skip
    finally:
        if claim is not None:
            claim.give_back()
    left = []
    for run in runs:
        result = result_file(folder, run)
        if result.exists() and read_result(result)["status"] == "failed" and retry:
            result.unlink()
        if not result.exists():
            left.append(run)
    return left


def _choices(protocol: Protocol, run: Run) -> list[dict[str, Any]]:
    found = [dict(setting) for setting in protocol.candidates(run.entry)]
    return json.loads(json.dumps([{**found_, "options": dict(run.entry.options),
                                   "method": run.entry.method} for found_ in found]))  # fmt: skip


def _check_same(before: dict[str, Any], identity: dict[str, Any], folder: Path) -> None:
    then = before.get("protocol")
    if not isinstance(then, dict) or before.get("format") != FORMAT:
        raise FormatError("the description of a grid is malformed", where=str(folder / GRID),
                          fix="restore it, or give another --out")  # fmt: skip
    names = [k for k in identity if then.get(k) != identity[k]]
    if not names:
        return
    told = []
    for name in names:
        old, new = then.get(name), identity[name]
        if isinstance(old, dict) and isinstance(new, dict):
            told += [
                f"{k} {old.get(k)!r} then, {v!r} now" for k, v in new.items() if old.get(k) != v
            ]
        else:
            told.append(f"{name} {old!r} then, {new!r} now")
    raise TrainingError(
        "this folder holds a grid of another protocol", where=str(folder),
        found="; ".join(told), fix="use the protocol of then, or another --out",
    )  # fmt: skip


def protocol_of(folder: Path, weights: Path | None = None) -> Protocol:
    """The protocol a grid was run under, to load its backbone and tasks again.

    Args:
        folder: Of the grid.
        weights: File of the backbone's weights, which may lie elsewhere here.

    Raises:
        FormatError: No grid is there, or its description is malformed.
    """
    try:
        found = dict(read_json(folder / GRID)["protocol"])
        settings = FitSettings(**{**found.pop("settings"), "seed": 0})
        found.pop("choices")
        return Protocol(**{**found, "weights": str(weights) if weights else None,
                           "settings": settings})  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(
            "the description of a grid is malformed", where=str(folder / GRID),
            found=f"{type(error).__name__}: {error}", fix="restore it, or run the grid again",
        ) from None  # fmt: skip


def carry_out(job: Job, jobs: int = 1, listen: Listener = lambda event: None) -> int:
    """Make every run of a grid that has no result, in processes side by side.

    Several calls, on one machine or on several that share the folder, divide the runs among them
    by claims that a dying process gives back.

    Args:
        job: Runs and protocol.
        jobs: Processes; 1 works in this one.
        listen: Told what happens.

    Returns:
        Number of runs that failed, with results that say why.

    Raises:
        TrainingError: A process ended before its share was done.
    """
    if jobs == 1:
        work(job, 0, listen)
    else:
        _side_by_side(job, jobs, listen)
    results = (read_result(result_file(job.folder, run)) for run in job.runs)
    return sum(result["status"] == "failed" for result in results)


def _side_by_side(job: Job, jobs: int, listen: Listener) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    # Threads of libraries are fixed when they are loaded, so a child must find them set.
    before = {k: os.environ.get(k) for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    os.environ.update(dict.fromkeys(before, str(job.threads)))
    workers = [
        context.Process(target=_child, args=(job, number, queue, os.getpid()), daemon=True)
        for number in range(jobs)
    ]
    handler = signal.signal(signal.SIGTERM, _stop)
    try:
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers) or not queue.empty():
            if queue.empty():
                time.sleep(POLL)
                continue
            listen(queue.get())
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join()
        signal.signal(signal.SIGTERM, handler)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    left = [run for run in job.runs if not result_file(job.folder, run).exists()]
    if left:
        codes = [str(worker.exitcode) for worker in workers]
        raise TrainingError(
            "processes ended before the grid was done", where=str(job.folder),
            found=f"{len(left)} runs left, first {left[0]}; exit codes {', '.join(codes)}",
            fix="the same command goes on; with fewer --jobs if memory was short (code -9)",
        )  # fmt: skip


def _stop(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _child(job: Job, number: int, queue: Any, parent: int) -> None:
    def listen(event: Event) -> None:
        if os.getppid() != parent:
            # Nobody is left who asked for this.
            raise SystemExit(1)
        queue.put(event)

    try:
        work(job, number, listen)
    except (RestuningError, KeyboardInterrupt) as error:
        queue.put(Event(number, "end", str(error)))
        raise SystemExit(1) from None


def work(job: Job, number: int, listen: Listener) -> None:
    """One process: take runs that nobody has, again and again until every run has its result.

    A final run whose searches are not all there yet is passed over. So is one that another process
    has claimed; should that process die, its claim is free at the next look.
    """
    torch.set_num_threads(job.threads)
    left = [run for run in job.runs if not result_file(job.folder, run).exists()]
    if not left:
        return
    left = _turned(left, number)
    bench = Bench(job.protocol, job.folder, job.stores, job.keep)
    while left:
        made = [_claimed(job, bench, run, number, listen) for run in left if _ready(job, run)]
        left = [run for run in left if not result_file(job.folder, run).exists()]
        if left and not any(made):
            time.sleep(POLL)


def _turned(runs: list[Run], number: int) -> list[Run]:
    """Runs by task; each process begins elsewhere, so that tasks are decoded side by side."""
    tasks = list(dict.fromkeys(run.task.name for run in runs))
    order = tasks[number % len(tasks) :] + tasks[: number % len(tasks)]
    return sorted(runs, key=lambda run: order.index(run.task.name))


def _ready(job: Job, run: Run) -> bool:
    before = searches(job.protocol, run.task, run.entry) if run.stage == "final" else []
    return all(result_file(job.folder, search).exists() for search in before)


def _claimed(job: Job, bench: Bench, run: Run, number: int, listen: Listener) -> bool:
    """Make a run if nobody has made or claimed it; whether it was made here."""
    file = result_file(job.folder, run)
    if file.exists():
        return False
    lock = job.folder / WORK / "claims" / f"{run.name.replace('/', '.')}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    claim = Claim.take(lock, wait=False)
    if claim is None:
        return False
    try:
        if file.exists():
            return False
        listen(Event(number, "start", str(run)))
        listen(_made(bench, run, file, number))
        return True
    finally:
        claim.give_back()


def _made(bench: Bench, run: Run, file: Path, number: int) -> Event:
    """Make a run and write its result, whatever it is."""
    started = time.perf_counter()
    try:
        result = bench.run(run)
    except Exception as error:  # noqa: BLE001 (one run that fails must not stop a grid)
        known = isinstance(error, RestuningError)
        result = {
            **head(run), "status": "failed", "error": f"{type(error).__name__}: {error}",
            "trace": "" if known else traceback.format_exc(limit=-6),
            "setting": dict(run.setting), "options": dict(run.entry.options),
            "seconds": {"whole": time.perf_counter() - started}, "versions": versions(),
            "protocol": json.loads(json.dumps(asdict(bench.protocol.settings))),
        }  # fmt: skip
        write_json(file, result)
        return Event(number, "failed", f"{run}  {str(error).splitlines()[0]}")
    write_json(file, result)
    return Event(number, "done", str(run), result["accuracy"], result["split"])
