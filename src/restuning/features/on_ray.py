"""A store's shares as tasks of Ray, which starts a worker again that was killed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from restuning._errors import RestuningError, StoreError, require
from restuning._files import expand_home
from restuning.features.away import refuse_away
from restuning.features.manifest import MARKS
from restuning.features.named import USUAL, write_share
from restuning.features.share import merge_shares, read_marks
from restuning.features.stages import MOST_WORKERS
from restuning.features.store import Store, list_of_data
from restuning.features.stored import StoreOptions

RETRIES = 3
"""Workers that may die of one share; what they finished of it is not computed again."""


def build_on_ray(
    data: str | Path,
    backbone: str = "restuning-tiny",
    address: str | None = None,
    *,
    workers: int | None = None,
    options: StoreOptions = USUAL,
    **how: Any,
) -> Store:
    """Write the shares of a store in tasks of Ray, and merge them: the store of `build_store`.

    Data and stores must lie where every node sees them under one path, and this library must be
    installed on all nodes. Nothing is sent but names and options.

    Args:
        data, backbone, options, how: As for `write_share`; but each worker that is not told how many
            processes load for it takes its part of the cores, not all of a machine that several share.
        address: Of a cluster; None for Ray's own choice, which is one on this machine where nothing
            else is set.
        workers: Shares; None for one a GPU of the cluster, or one a core where it has none. Of a store that
            was begun in shares, their number is kept.

    Raises:
        MissingExtraError: Ray is not installed.
        StoreError: The cluster cannot be reached, or workers of a share died time and again; shares that are
            whole are kept, and the same call goes on.
        RestuningError: As `write_share`.
    """
    refuse_away(options.root, "--on ray")
    ray = require("ray", "ray", "a store that is built on Ray")
    where = expand_home(data)
    name = str(where.absolute()) if where.exists() else str(data)
    root = options.folder.absolute()
    with _cluster(ray, address):
        there = ray.cluster_resources()
        gpus = int(there.get("GPU", 0))
        cores, begun = max(1, int(there.get("CPU", 1))), _begun(name, root)
        count = begun or workers or gpus or cores
        loaders = options.workers
        if loaders is None:
            loaders = min(MOST_WORKERS, max(0, cores // count - 1))
        options.log(
            f"ray  {count} shares{' as they were begun' * bool(begun)} on {len(ray.nodes())} nodes, "
            f"{gpus} GPUs, {loaders} loader processes each"
        )
        plain = replace(options, root=root, workers=loaders, progress=False, log=StoreOptions().log)
        task = ray.remote(max_retries=RETRIES, num_cpus=1, num_gpus=min(1, gpus))(write_share)
        waiting = [
            task.remote(name, backbone, f"{number}/{count}", options=plain, **how)
            for number in range(1, count + 1)
        ]
        folder = None
        while waiting:
            done, waiting = ray.wait(waiting)
            written = _result(ray, done[0])
            folder = written.path
            options.log(f"ray  share {written.share}: {written.stages}")
    assert folder is not None
    return merge_shares(folder)


def _begun(data: str, root: Path) -> int:
    """The number of shares that these data were begun in; 0 where they were not."""
    counts = {
        mark.share.of
        for folder in list_of_data(data, root)
        if any(folder.glob(MARKS))
        for mark in read_marks(folder)
    }
    # Of two stores, or two counts, the workers say what does not fit.
    return counts.pop() if len(counts) == 1 else 0


@contextmanager
def _cluster(ray: Any, address: str | None) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    # Nothing is told to its makers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise StoreError(
            "a Ray cluster cannot be reached",
            where=address or "",
            found=str(error).splitlines()[0][:200],
            fix="start one (`ray start --head`), or give --on ray for one on this machine",
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _result(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        # As a worker that is no task would have said it.
        if isinstance(error.cause, RestuningError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise StoreError(
            "workers of a share died time and again",
            found=str(error).splitlines()[0][:200],
            fix="look at Ray's logs (memory, most often); run the same again: what is whole is kept",
        ) from None
