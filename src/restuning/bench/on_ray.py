"""A grid's runs as tasks of Ray, which divide them among themselves as processes on one folder do."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from restuning._errors import TrainingError
from restuning._files import expand_home
from restuning._ray import absolute_name, on_cluster
from restuning.bench.folder import read_run, result_file
from restuning.bench.grid import GridRun
from restuning.bench.runner import Event, Job, Listener, count_failed, take_runs
from restuning.features.away import refuse_away


def run_grid_on_ray(
    job: Job,
    address: str | None = None,
    *,
    workers: int | None = None,
    listen: Listener = lambda event: None,
) -> int:
    """Make every run of a grid that has no result, in tasks of Ray: the results of `run_grid`.

    Data, stores and the grid's folder must lie where every node sees them under one path, and this library must be
    installed on all nodes. Nothing is sent but names and settings.

    Args:
        job: Runs and protocol; each worker takes as many cores as it has threads.
        address: Of a cluster; None for Ray's own choice, which is one on this machine where nothing
            else is set.
        workers: Tasks; None for one a GPU of the cluster, or where it has none as many as its cores have room for. No
            more than there are runs.
        listen: Told what is done, and not which run a worker begins.

    Returns:
        Number of runs that failed, with results that say why.

    Raises:
        MissingExtraError: Ray is not installed.
        TrainingError: The cluster cannot be reached, or workers died time and again; what is done is kept, and the
            same call goes on.
        StoreError: Stores lie at a URL.
    """
    refuse_away(job.stores, "--on ray")
    left = [run for run in job.runs if not result_file(job.folder, run).exists()]
    if not left:
        return count_failed(job)
    there = _for_workers(job)
    with on_cluster(address, "a grid on Ray", TrainingError) as cluster:
        count = min(workers or cluster.workers(job.threads), len(left))
        told = f"ray: {count} workers on {cluster.nodes} nodes, {cluster.gpus} GPUs"
        listen(Event(0, "note", told))
        waiting = list(left)

        def look() -> None:
            for run in list(waiting):
                if result_file(job.folder, run).exists():
                    waiting.remove(run)
                    listen(_describe(job, run))

        calls = [partial(_take, there, number) for number in range(count)]
        for notes in cluster.run(calls, take_runs.__name__, cores=job.threads, look=look):
            for note in notes:
                listen(Event(0, "note", note))
        look()
    return count_failed(job)


def _take(job: Job, number: int) -> list[str]:
    """One worker; what it has to say beside its results."""
    notes: list[str] = []

    def listen(event: Event) -> None:
        if event.kind == "note":
            notes.append(event.what)

    take_runs(job, number, listen)
    return notes


def _for_workers(job: Job) -> Job:
    """The same by paths that are those of every node."""
    weights = job.protocol.weights
    return replace(
        job,
        protocol=replace(job.protocol, weights=weights and absolute_name(weights)),
        folder=expand_home(job.folder).absolute(),
        stores=None if job.stores is None else expand_home(job.stores).absolute(),
        runs=[
            replace(run, task=replace(run.task, source=absolute_name(run.task.source)))
            for run in job.runs
        ],
    )


def _describe(job: Job, run: GridRun) -> Event:
    """A finished run as the process that made it would tell it."""
    result = read_run(job.folder, run, job.protocol)
    if result["status"] == "failed":
        _, _, why = result["error"].partition(": ")
        return Event(0, "failed", f"{run}  {why.splitlines()[0] if why else result['error']}")
    return Event(0, "done", str(run), result["accuracy"], result.get("split", ""))
