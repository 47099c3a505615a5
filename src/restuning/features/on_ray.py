"""A store's shares as tasks of Ray, which starts a worker again that was killed."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from restuning._errors import StoreError
from restuning._ray import absolute_name, on_cluster
from restuning.features.away import refuse_away
from restuning.features.manifest import MARKS
from restuning.features.named import USUAL, write_share
from restuning.features.share import merge_shares, read_marks
from restuning.features.stages import MOST_WORKERS
from restuning.features.store import Store, list_of_data
from restuning.features.stored import StoreOptions


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
    name, root = absolute_name(data), options.folder.absolute()
    with on_cluster(address, "a store that is built on Ray", StoreError) as cluster:
        begun = _begun(name, root)
        count = begun or workers or cluster.workers()
        loaders = options.workers
        if loaders is None:
            loaders = min(MOST_WORKERS, max(0, cluster.cores // count - 1))
        options.log(
            f"ray  {count} shares{' as they were begun' * bool(begun)} on {cluster.nodes} nodes, "
            f"{cluster.gpus} GPUs, {loaders} loader processes each"
        )
        plain = replace(options, root=root, workers=loaders, progress=False, log=StoreOptions().log)
        share = partial(write_share, name, backbone, options=plain, **how)
        calls = [partial(share, f"{number}/{count}") for number in range(1, count + 1)]
        folder = None
        for written in cluster.run(calls, write_share.__name__):
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
