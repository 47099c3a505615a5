"""A sweep's runs as tasks of Ray, which share its folder as banks that nobody else has in hand."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from restuning._errors import TrainingError
from restuning._files import expand_home, hold_folder
from restuning._ray import absolute_name, on_cluster
from restuning.features import StoreOptions
from restuning.features.away import refuse_away
from restuning.search.sweep import (
    CLAIMS,
    RATES,
    TOGETHER,
    TRIED,
    OnProgress,
    Sweep,
    SweepRequest,
    list_sweep_runs,
    refuse_augment,
    run_sweep,
    share_sweep,
)


def run_sweep_on_ray(
    request: SweepRequest,
    address: str | None = None,
    *,
    out: str | Path | None,
    workers: int | None = None,
    device: str | torch.device | None = None,
    on_progress: OnProgress = lambda done, total, best: None,
) -> Sweep:
    """Make the runs of a sweep in tasks of Ray, and end it here: the sweep of `run_sweep`.

    Workers share what one process makes one after the other: banks, of up to 16 runs of one form and seed.
    Data, stores and the sweep's folder must lie where every node sees them under one path, and this library must be
    installed on all nodes. Nothing is sent but names and settings.

    Args:
        request: Of data and a backbone by name.
        address: Of a cluster; None for Ray's own choice, which is one on this machine where nothing
            else is set.
        out: Folder of the sweep. It must be given: the usual one is named after the time.
        workers: Tasks; None for one a GPU of the cluster, or one a core where it has none, and no more than
            there are banks.
        device, on_progress: As for `run_sweep`; it is told after each bank.

    Raises:
        MissingExtraError: Ray is not installed.
        TrainingError: Data or backbone are objects, there is no `out`, the cluster cannot be reached, or workers died
            time and again; runs that are whole are kept, and the same call goes on.
        StoreError: Stores lie at a URL.
        RestuningError: As `run_sweep`.
    """
    begun = time.perf_counter()
    source = request.source
    refuse_away(source.store.root, "--on ray")
    refuse_augment(source.augment)
    for what, given in (("data", source.name), ("a backbone", request.backbone)):
        if not isinstance(given, str | Path):
            raise TrainingError(
                f"a sweep on Ray takes {what} by name: every worker loads it",
                found=f"an object, {type(given).__name__}",
                fix="give its name or path, or sweep in this process",
            )
    if out is None:
        raise TrainingError(
            "a sweep on Ray needs a folder that every node sees", fix="give one with --out"
        )
    folder = expand_home(out).absolute()
    log = source.store.log
    there = _for_workers(request)
    runs = list_sweep_runs(request.grid, request.seeds)
    with (
        hold_folder(folder),
        on_cluster(address, "a sweep on Ray", TrainingError) as cluster,
    ):
        count = min(workers or cluster.workers(), _count_banks(request.grid, request.seeds))
        log(f"ray  {count} workers on {cluster.nodes} nodes, {cluster.gpus} GPUs")
        told = (-1, -1)

        def look() -> None:
            nonlocal told
            tried = sum((folder / TRIED / f"{run.name}.json").exists() for run in runs)
            final = len(list((folder / "final").glob("*.json")))
            now = (final, len(request.seeds)) if tried == len(runs) else (tried, len(runs))
            if now != told:
                told = now
                on_progress(*now, "")

        calls = [partial(share_sweep, there, folder, device) for _ in range(count)]
        for _ in cluster.run(calls, share_sweep.__name__, look=look):
            pass
        shutil.rmtree(folder / CLAIMS, ignore_errors=True)
        return run_sweep(request, out=folder, device=device, on_progress=on_progress, started=begun)


def _for_workers(request: SweepRequest) -> SweepRequest:
    """The same by paths that are those of every node, and without what is told here."""
    source = request.source
    store = replace(
        source.store,
        root=source.store.folder.absolute(),
        progress=False,
        log=StoreOptions().log,
    )
    classes = source.classes
    return replace(
        request,
        source=replace(
            source,
            # Data that were given as an object are refused before.
            name=absolute_name(str(source.name)),
            classes=absolute_name(classes) if isinstance(classes, str) else classes,
            store=store,
        ),
        backbone=str(request.backbone),
        weights=None if request.weights is None else expand_home(request.weights).absolute(),
    )


def _count_banks(grid: Mapping[str, Sequence[Any]], seeds: Sequence[int]) -> int:
    """At most so many banks are made of the runs of a grid."""
    parted = [k for k in grid if k not in RATES or k in ("epochs", "batch")]
    forms = math.prod(len(grid[k]) for k in parted)
    rates = math.prod(len(values) for k, values in grid.items() if k not in parted)
    return forms * len(seeds) * math.ceil(rates / TOGETHER)
