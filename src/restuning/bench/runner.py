"""A grid carried out by several processes, here or elsewhere, until every run has its result."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from restuning._errors import RestuningError, TrainingError
from restuning._files import Claim, write_json
from restuning.bench.bench import Bench
from restuning.bench.entries import is_detached
from restuning.bench.folder import WORK, describe_run, read_run, result_file
from restuning.bench.grid import GridProtocol, GridRun, search_runs
from restuning.bench.measure import read_versions
from restuning.training.own_size import note_smaller_size

POLL = 0.5
"""Seconds between two looks at what other processes have done."""


@dataclass(frozen=True)
class Event:
    """What a worker tells: `kind` "note", "start", "done", "failed" or "end"."""

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
        protocol, folder, stores, keep, track: Of the `Bench`.
        runs: All runs of the grid, in order.
        threads: Of torch, for this process.
    """

    protocol: GridProtocol
    folder: Path
    runs: list[GridRun]
    stores: Path | None = None
    keep: bool = False
    threads: int = 1
    track: tuple[str, ...] = ()


def run_grid(job: Job, jobs: int = 1, listen: Listener = lambda event: None) -> int:
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
        take_runs(job, 0, listen)
    else:
        _side_by_side(job, jobs, listen)
    return count_failed(job)


def count_failed(job: Job) -> int:
    """Runs that failed, of a grid whose runs have their results."""
    results = (read_run(job.folder, run, job.protocol) for run in job.runs)
    return sum(result["status"] == "failed" for result in results)


def _side_by_side(job: Job, jobs: int, listen: Listener) -> None:
    # A fork would copy torch's threads in whatever state they are.
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    # Threads of libraries are fixed when they are loaded, so a child must find them set.
    variables = {k: os.environ.get(k) for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    os.environ.update(dict.fromkeys(variables, str(job.threads)))
    workers = [
        context.Process(target=_child, args=(job, number, queue, os.getpid()), daemon=True)
        for number in range(jobs)
    ]
    # So that `finally` runs on a termination too and no child is left behind.
    handler = signal.signal(signal.SIGTERM, _stop)
    try:
        for worker in workers:
            worker.start()
        # Events that are still in the queue come after the last worker's end.
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
        for name, value in variables.items():
            # The caller's environment is as it was.
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    unfinished = [run for run in job.runs if not result_file(job.folder, run).exists()]
    if unfinished:
        codes = [str(worker.exitcode) for worker in workers]
        raise TrainingError(
            "processes ended before the grid was done",
            where=str(job.folder),
            found=f"{len(unfinished)} runs left, first {unfinished[0]}; exit codes {', '.join(codes)}",
            fix="the same command goes on; with fewer --jobs if memory was short (code -9)",
        )


def _stop(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


def _child(job: Job, number: int, queue: Any, parent: int) -> None:
    def listen(event: Event) -> None:
        if os.getppid() != parent:
            # Nobody is left who asked for this.
            raise SystemExit(1)
        queue.put(event)

    try:
        take_runs(job, number, listen)
    except (RestuningError, KeyboardInterrupt) as error:
        queue.put(Event(number, "end", str(error)))
        # Of its own accord: the queue has told the caller why.
        raise SystemExit(1) from None


def take_runs(job: Job, number: int, listen: Listener) -> None:
    """One process: take runs that nobody has, again and again until every run has its result.

    A final run whose searches are not all there yet is passed over. So is one that another process
    has claimed; should that process die, its claim is free at the next look.
    """
    # The environment sets libraries, this torch itself, where it runs in the caller's process.
    torch.set_num_threads(job.threads)
    unfinished = [run for run in job.runs if not result_file(job.folder, run).exists()]
    if not unfinished:
        return
    unfinished = _rotate(unfinished, number)
    # Of all runs, so that every process stores the same.
    entries = list({run.entry.label: run.entry for run in job.runs}.values())
    bench = Bench(job.protocol, job.folder, job.stores, job.keep, entries, job.track)
    detached = any(is_detached(run.entry) for run in unfinished)
    # One of several processes speaks for all.
    if number == 0 and (note := note_smaller_size(bench.backbone, detached=detached)):
        listen(Event(number, "note", note))
    while unfinished:
        done = [
            _claim_and_run(job, bench, run, number, listen)
            for run in unfinished
            if _is_ready(job, run)
        ]
        unfinished = [run for run in unfinished if not result_file(job.folder, run).exists()]
        # All that is left is in other hands, or waits for searches there.
        if unfinished and not any(done):
            time.sleep(POLL)


def _rotate(runs: list[GridRun], number: int) -> list[GridRun]:
    """Runs by task; each process begins elsewhere, so that tasks are decoded side by side."""
    tasks = list(dict.fromkeys(run.task.name for run in runs))
    order = tasks[number % len(tasks) :] + tasks[: number % len(tasks)]
    return sorted(runs, key=lambda run: order.index(run.task.name))


def _is_ready(job: Job, run: GridRun) -> bool:
    # A final run takes the setting that its searches found best.
    searches = search_runs(job.protocol, run.task, run.entry) if run.stage == "final" else []
    return all(result_file(job.folder, search).exists() for search in searches)


def _claim_and_run(job: Job, bench: Bench, run: GridRun, number: int, listen: Listener) -> bool:
    """Make a run that nobody has made or claimed; returns whether it was made here."""
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
        listen(_run_and_write(bench, run, file, number))
        return True
    finally:
        claim.give_back()


def _trace(error: Exception) -> list[str]:
    """The places an error went through, innermost last, without folders of this machine."""
    frames = traceback.extract_tb(error.__traceback__)[-8:]
    return [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames]


def _run_and_write(bench: Bench, run: GridRun, file: Path, number: int) -> Event:
    """Make a run and write its result, be it a success or a failure."""
    started = time.perf_counter()
    try:
        result = bench.run(run)
    except Exception as error:  # noqa: BLE001 (one run that fails must not stop a grid)
        # Our own errors say what to do; of all others the place is what helps.
        known = isinstance(error, RestuningError)
        result = {
            **describe_run(run, bench.protocol),
            "status": "failed",
            "error": f"{type(error).__name__}: {error}",
            "trace": [] if known else _trace(error),
            "setting": dict(run.setting),
            "options": dict(run.entry.options),
            "seconds": {"whole": time.perf_counter() - started},
            "versions": read_versions(),
            "protocol": json.loads(json.dumps(asdict(bench.protocol.settings))),
        }
        write_json(file, result, sealed=True)
        return Event(number, "failed", f"{run}  {str(error).splitlines()[0]}")
    write_json(file, result, sealed=True)
    return Event(number, "done", str(run), result["accuracy"], result["split"])
