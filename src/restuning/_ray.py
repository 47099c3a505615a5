"""Work given out to Ray, which starts a worker again that was killed: a cluster, how many workers, what they return."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from restuning._errors import RestuningError, require
from restuning._files import expand_home
from restuning.runtime.hub import named_in, naming_file

RETRIES = 3
"""Workers that may die of one call; what they finished of it is not computed again."""

LOOK = 0.5
"""Seconds between two looks at what workers have left."""


@dataclass(frozen=True)
class Cluster:
    """A cluster of Ray that is connected to.

    Attributes:
        ray: The library.
        error: Raised where workers cannot be had, or died time and again.
        nodes, gpus, cores: Of all of it.
    """

    ray: Any
    error: type[RestuningError]
    nodes: int
    gpus: int
    cores: int

    def workers(self, cores: int = 1) -> int:
        """Workers that it has room for: one a GPU, or where it has none one for so many cores."""
        return self.gpus or max(1, self.cores // cores)

    def run(
        self,
        calls: Sequence[Callable[[], Any]],
        name: str,
        *,
        cores: int = 1,
        look: Callable[[], object] | None = None,
    ) -> Iterator[Any]:
        """Make each call in a task of its own; what they return, in the order in which they end.

        Args:
            calls: Of functions of this library, which is all that is sent beside their arguments.
            name: Of the tasks, as Ray shows it.
            cores: Of each; a GPU as well where the cluster has any.
            look: Called now and then meanwhile.

        Raises:
            RestuningError: As a call; or of the class `error`: no node has so many cores, or workers died
                time and again.
        """
        most = max((node["Resources"].get("CPU", 0) for node in self.ray.nodes()), default=0)
        if cores > most:
            # Ray would wait for such a node, and say nothing.
            raise self.error(
                "no node of the Ray cluster has so many cores",
                found=f"{cores} for each worker, {most:g} at most",
                fix="ask for fewer threads",
            )
        task = self.ray.remote(max_retries=RETRIES, num_cpus=cores, num_gpus=min(1, self.gpus))(
            _make
        )
        # Where a file names the backbone, workers fetch nothing either.
        file = naming_file() or None
        waiting = [task.options(name=name).remote(call, file) for call in calls]
        while waiting:
            done, waiting = self.ray.wait(waiting, timeout=None if look is None else LOOK)
            if look is not None:
                look()
            for each in done:
                yield self._result(each)

    def _result(self, reference: Any) -> Any:
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            # As a worker that is no task would have said it.
            if isinstance(error.cause, RestuningError):
                raise error.cause from None
            raise
        except self.ray.exceptions.RayError as error:
            raise self.error(
                "workers died time and again",
                found=str(error).splitlines()[0][:200],
                fix="look at Ray's logs (memory, most often); run the same again: what is whole is kept",
            ) from None


def _make(call: Callable[[], Any], file: str | None) -> Any:
    with named_in(file):
        return call()


@contextmanager
def on_cluster(address: str | None, purpose: str, error: type[RestuningError]) -> Iterator[Cluster]:
    """A cluster of Ray, connected to for as long as it is used; one that is connected already stays so.

    Args:
        address: None for Ray's own choice, which is one on this machine where nothing else is set.
        purpose: What it is needed for, to complete "... needs ray".
        error: The class of what is raised where it cannot be reached, or its workers die.

    Raises:
        MissingExtraError: Ray is not installed.
        RestuningError: Of the class `error`: the cluster cannot be reached.
    """
    ray = require("ray", "ray", purpose)
    connected = ray.is_initialized()
    if not connected:
        # Nothing is told to its makers.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            ray.init(address=address, log_to_driver=False, configure_logging=False)
        except (OSError, ValueError, RuntimeError) as wrong:
            raise error(
                "a Ray cluster cannot be reached",
                where=address or "",
                found=str(wrong).splitlines()[0][:200],
                fix="start one (`ray start --head`), or give --on ray for one on this machine",
            ) from None
    try:
        there = ray.cluster_resources()
        gpus, cores = int(there.get("GPU", 0)), max(1, int(there.get("CPU", 1)))
        yield Cluster(ray, error, len(ray.nodes()), gpus, cores)
    finally:
        if not connected:
            ray.shutdown()


def absolute_name(data: str | Path) -> str:
    """Data by a path that is the same on every node; a name of no file stays as it is."""
    where = expand_home(data)
    return str(where.absolute()) if where.exists() else str(data)
