"""Where the time of a pass over data goes: reading files, decoding them, forwards, writing."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, default_collate

from restuning._files import open_plain
from restuning.data.identity import is_decoded, list_files
from restuning.runtime.processes import count_on_machine

MOST_WORKERS = 16
"""Loader processes that are started unasked; each holds two batches."""

WORTH_WORKERS = 256
"""Images of a split from which loader processes are started unasked: they take a tenth of a second each."""

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (asked for its room, nothing is written by name)
"""Where batches of loader processes lie; 64 MB in a container that was not given more."""


@dataclass
class Stages:
    """Seconds that a pass spent so far.

    Attributes:
        rows: Inputs that went through the backbone.
        workers: Processes that read and decoded; 0 where the main one did.
        read: Reading files, of all workers together, estimated: the first file of a batch is read once
            more to be timed, and stands for all of them. Of tars what was waited for. 0 where data are no files.
        decode: Making tensors of them, of all workers together: what is left of loading.
        wait: Of the main process, for inputs.
        forward: Forwards, transfers to and from the device included.
        write: Encoding and writing shards; also copying them from another store.
    """

    rows: int = 0
    workers: int = 0
    read: float = 0.0
    decode: float = 0.0
    wait: float = 0.0
    forward: float = 0.0
    write: float = 0.0

    @property
    def seconds(self) -> float:
        """Of the main process: what the pass took."""
        return self.wait + self.forward + self.write

    @property
    def bottleneck(self) -> str:
        """What the main process spends most on; of waiting for inputs, what made it wait."""
        loading = "read" if self.read > self.decode else "decode"
        spent = {loading: self.wait, "forward": self.forward, "write": self.write}
        return max(spent, key=lambda name: spent[name])

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time inside to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, stage, getattr(self, stage) + time.perf_counter() - start)

    def __str__(self) -> str:
        """One line."""
        if not self.seconds:
            return "none spent: nothing was left to compute"
        by = f" by {self.workers} process{'es' * (self.workers > 1)}" if self.workers else ""
        rate = self.rows / max(self.seconds, 1e-9)
        return (
            f"{self.rows:,} forwards in {self.seconds:.1f} s, {rate:,.1f} a second; "
            f"read {self.read:.1f} s, decode {self.decode:.1f} s{by}, forward {self.forward:.1f} s, "
            f"write {self.write:.1f} s; the bottleneck is {self.bottleneck}"
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "seconds": self.seconds, "bottleneck": self.bottleneck}


Timed = tuple[Any, float, float]
"""Samples or a batch, seconds of reading, seconds of decoding."""


class TimedInputs(Dataset):
    """A data set whose batches say how long reading and decoding took; for a loader with `TimedBatch`.

    Args:
        dataset: Of samples.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.files = list_files(dataset)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.dataset)

    def __getitems__(self, indices: Sequence[int]) -> Timed:
        """Samples of a batch as the data set gives them, seconds of reading, of all together."""
        start = time.perf_counter()
        fetch = getattr(self.dataset, "fetch", None)
        if callable(fetch):
            contents = fetch(indices)
            fetched = time.perf_counter()
            samples = self.dataset.make(indices, contents)
            return samples, fetched - start, time.perf_counter() - fetched
        each = 0.0
        if self.files is not None:
            with suppress(OSError), open_plain(self.files[indices[0]]) as stream:
                stream.read()
            each = time.perf_counter() - start
        several = getattr(self.dataset, "__getitems__", None)
        samples = several(indices) if callable(several) else [self.dataset[i] for i in indices]
        # Also of loading the others: that of the first read it again, from memory.
        read = each * len(indices)
        return samples, read, max(0.0, time.perf_counter() - start - read)


class TimedBatch:
    """The collate function for `TimedInputs`: a batch, and seconds of reading and of decoding it."""

    def __init__(self, collate: Callable | None) -> None:
        self.collate = collate or default_collate

    def __call__(self, given: Timed) -> Timed:
        """Collate."""
        samples, read, decode = given
        start = time.perf_counter()
        return self.collate(samples), read, decode + time.perf_counter() - start


def choose_workers(dataset: Any, batch_size: int) -> int:
    """How many processes read and decode a data set, where nobody says: as many as cores but one.

    None for data that lie in memory or are few: starting them would take longer. No more than the
    shared memory holds batches of, three a worker.

    Args:
        dataset: Of `(input, label)`.
        batch_size: Inputs of one batch.
    """
    if not is_decoded(dataset) or len(dataset) < WORTH_WORKERS:
        return 0
    several = getattr(os, "sched_getaffinity", None)
    cores = len(several(0)) if several is not None else os.cpu_count() or 1
    most = min(MOST_WORKERS, cores // count_on_machine() - 1)
    if SHARED_MEMORY.is_dir():
        batch = dataset[0][0].nbytes * batch_size
        most = min(most, shutil.disk_usage(SHARED_MEMORY).free // (3 * batch))
    return max(0, most)
