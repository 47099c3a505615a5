"""Build a store: every shard written whole, claimed by one process, never computed twice."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from restuning._errors import StoreError
from restuning._files import Claim, write_bytes
from restuning.features.compute import Writer, compute_taps
from restuning.features.key import StoreKey
from restuning.features.manifest import KEY, MANIFEST, Shard, read_entry, read_key
from restuning.features.stages import Stages
from restuning.features.store import Store
from restuning.features.writing import explain_write_errors, finish, is_written
from restuning.host import Extractor, is_shared_out
from restuning.runtime.processes import is_main_process
from restuning.runtime.shown import draws_bars

SHARD_BYTES = 64 * 2**20
SHARD_ROWS = 512
"""The most a killed process loses: 512 forwards, about a minute of one CPU core on ViT-S."""

MANY = 1000
"""Files of the usual size from which a store has larger ones unasked."""

LARGE_BYTES = 256 * 10**6
"""Of a file of such a store: 10 million class tokens of ViT-B in fp16 are 780 files and not 20,000."""

MOST_ROWS = 2**19
"""Of a shard of any size: their labels stand in one JSON file, of which no more is read."""

TIMED = 4
"""Inputs of the forward that a forecast times."""


@dataclass(frozen=True)
class Forecast:
    """What building a store will take.

    Attributes:
        rows: Forwards of one input.
        bytes: On disk.
        free: Free bytes there.
        seconds: From one timed forward; without reading and decoding of inputs.
    """

    rows: int
    bytes: int
    free: int
    seconds: float

    def __str__(self) -> str:
        """One line."""
        return (
            f"{self.rows:,} forwards, about {self.seconds:,.0f} s; {self.bytes / 2**20:,.1f} MiB "
            f"({self.free / 2**30:,.1f} GiB free)"
        )


def forecast(
    host: Extractor,
    key: StoreKey,
    root: Path,
    example: Mapping[str, Any] | Any,
    batch_size: int = 32,
    lent: Mapping[str, Store] = MappingProxyType({}),
) -> Forecast:
    """Size and time of building a store, before anything is written.

    Args:
        host: The frozen backbone.
        key: Of the store.
        root: Where stores lie.
        example: One input, batch 1.
        batch_size: Of the extraction.
        lent: As for `build`.
    """
    rows = sum(
        n * (len(key.views) if split == "train" else 1)
        for split, n in key.splits.items()
        if split not in lent
    )
    # A few inputs are enough: a forward of a whole batch, twice, is a cost of its own.
    batch_size = min(batch_size, TIMED)

    def repeat(value: Any) -> Any:
        return value.expand(batch_size, *value.shape[1:]) if isinstance(value, Tensor) else value

    start = 0.0
    # The first forward also sets kernels and memory up; the second is timed.
    for _ in range(2):
        start = time.perf_counter()
        if isinstance(example, Mapping):
            compute_taps(host, key, {k: repeat(v) for k, v in example.items()})
        else:
            compute_taps(host, key, *map(repeat, example))
    seconds = (time.perf_counter() - start) / batch_size * rows
    # The root may be made later; its disk is that of the nearest folder that is there.
    there = next(p for p in [root, *root.absolute().parents] if p.exists())
    return Forecast(rows, key.rows * key.bytes_per_row, shutil.disk_usage(there).free, seconds)


def build(
    host: Extractor,
    key: StoreKey,
    root: Path,
    splits: Mapping[tuple[str, int], Any],
    *,
    batch_size: int = 32,
    workers: int | None = 0,
    collate: Callable | None = None,
    progress: bool = True,
    check: Callable[[str, int, int], None] = lambda split, start, stop: None,
    lent: Mapping[str, Store] = MappingProxyType({}),
    shard_bytes: int | None = None,
    stages: Stages | None = None,
) -> Store:
    """Compute what is missing of a store and open it.

    Several processes may run this at once on one folder: each shard is claimed by one of them.
    A process that dies gives its claim back; its unfinished shard is computed again. Where the backbone is
    shared out among processes they make every forward together, and the first of them writes.

    Args:
        host: The frozen backbone.
        key: Of the store.
        root: Where stores lie; the store is `root/DATA-DIGEST`.
        splits: Data sets of `(input, label)` by split and number of the view.
        batch_size: Inputs of one forward.
        workers: Processes that read and decode inputs; None for as many as `choose_workers` says.
        collate: Samples to a batch.
        progress: A bar on a terminal.
        check: Called with a split and a range of its inputs when they were read, before their
            features are kept; raises where they are no longer those of the key.
        lent: Stores that hold some splits already, by split: those are copied, and no forward is made.
        shard_bytes: Of one file of values, as they are kept; None for at most `SHARD_BYTES` and
            `SHARD_ROWS`, and for `LARGE_BYTES` where these would be more than `MANY` files. A process holds the rows of one in fp32 until it is written, and a killed
            one loses them.
        stages: Receives where the time went.

    Raises:
        StoreError: The disk is full or cannot be written, features are not finite, or the folder
            holds another store. Shards that were finished stay.
    """
    folder = place(root, key)
    if (folder / MANIFEST).exists():
        return open_finished(folder, key)
    prepare(folder, key)
    plan = cut(key, shard_rows(key, batch_size, shard_bytes))
    missing = count_missing(folder, key, plan)
    with show_progress(key.rows, key.rows - missing, progress) as shown:
        stages = Stages() if stages is None else stages
        writer = Writer(
            host, key, folder, batch_size, workers, collate, shown, check, stages, claimed=True
        )
        model: Any = getattr(host, "model", None)
        if together := isinstance(model, nn.Module) and is_shared_out(model):
            writer = replace(writer, together=True)
            plan_now = _agree(folder, plan)
        # First what nobody has claimed, then what others had claimed and may have left behind.
        for wait in (False, True):
            for (split, view), dataset in splits.items():
                shards = [s for s in plan if (s.split, s.view) == (split, view)]
                if split in lent:
                    replace(writer, together=False).copy(shards, lent[split], wait)
                elif together:
                    # Nobody else has claimed any of these, so once.
                    shards = [s for s in shards if s in plan_now and not wait]
                    writer.write(shards, dataset, wait)
                else:
                    writer.write(shards, dataset, wait)
    if not together or torch.distributed.get_rank() == 0:
        finish_once(folder, key, plan)
    if together:
        torch.distributed.barrier()
    return open_finished(folder, key)


def _agree(folder: Path, plan: list[Shard]) -> list[Shard]:
    """The shards that are still to be computed, as the first process finds them."""
    missing = [[shard for shard in plan if not is_written(folder, shard)]]
    torch.distributed.broadcast_object_list(missing)
    return missing[0]


def count_missing(folder: Path, key: StoreKey, plan: list[Shard]) -> int:
    """Rows that are still to be computed of some shards.

    Raises:
        StoreError: One that is there is damaged, or there is no room for the rest.
    """
    missing = 0
    for shard in plan:
        if is_written(folder, shard):
            # What is damaged is told of now, not after all others are computed.
            read_entry(folder, key, shard)
        else:
            missing += shard.stop - shard.start
    if missing * key.bytes_per_row > shutil.disk_usage(folder).free:
        raise StoreError(
            "there is no room for the store",
            where=str(folder),
            found=f"{missing * key.bytes_per_row / 2**20:,.1f} MiB wanted, "
            f"{shutil.disk_usage(folder).free / 2**20:,.1f} MiB free",
            fix="free space, choose --store elsewhere, or a smaller --dtype",
        )
    return missing


@contextmanager
def show_progress(rows: int, done: int, shown: bool) -> Iterator[Callable[[int, Stages], None]]:
    """A bar on a terminal that names the bottleneck; what it gives receives rows that were computed."""
    # Imported here: most who read stores never build one.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not (shown and draws_bars(console) and is_main_process()),
    )
    with bar:
        line = bar.add_task("features", total=rows, completed=done)
        yield lambda more, stages: bar.update(
            line, advance=more, description=f"features (most time: {stages.bottleneck})"
        )


def finish_once(folder: Path, key: StoreKey, plan: list[Shard]) -> None:
    """Write the manifest; of several writers one does, and the others find it there."""
    claim = Claim.take(folder / "manifest.lock", wait=True)
    try:
        if not (folder / MANIFEST).exists():
            finish(folder, key, plan)
        # Each writer: one that waited has made locks again. All is written that they were for.
        for lock in folder.glob("*.lock"):
            lock.unlink(missing_ok=True)
    finally:
        if claim is not None:
            claim.give_back()


def place(root: Path, key: StoreKey) -> Path:
    """The folder of a store."""
    return Path(root) / f"{key.data['name']}-{key.digest[:12]}"


def open_finished(folder: Path, key: StoreKey) -> Store:
    """Open the store of a key.

    Raises:
        StoreError: The folder holds another one, or it is not what was written.
    """
    store = Store(folder)
    _refuse_other(folder, store.key, key)
    return store


def _refuse_other(folder: Path, there: StoreKey, wanted: StoreKey) -> None:
    if there.digest != wanted.digest:
        raise StoreError(
            "the folder holds another store",
            where=str(folder),
            found=f"key {there.digest[:12]}, wanted {wanted.digest[:12]}",
            fix="choose --store elsewhere",
        )


def prepare(folder: Path, key: StoreKey) -> None:
    """Make the folder of a store, or go on with it.

    Raises:
        StoreError: It holds another store, or cannot be written.
    """
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(folder / KEY):
            _refuse_other(folder, read_key(folder), key)
        else:
            write_bytes(folder / KEY, json.dumps(key.to_dict(), indent=1).encode())


def shard_rows(key: StoreKey, batch_size: int, shard_bytes: int | None = None) -> int:
    """Rows of one shard: whole batches, so that a shard's values do not depend on who computes it."""
    row = max(1, key.bytes_per_row)
    rows = min(SHARD_ROWS, SHARD_BYTES // row)
    if shard_bytes is None and key.rows > MANY * max(batch_size, rows):
        shard_bytes = LARGE_BYTES
    if shard_bytes is not None:
        rows = min(MOST_ROWS, shard_bytes // row)
    return max(batch_size, rows // batch_size * batch_size)


def cut(key: StoreKey, rows: int) -> list[Shard]:
    """All shards of a store, where one has so many rows."""
    return [
        Shard(split, view, start, min(start + rows, count))
        for split, count in key.splits.items()
        for view in range(len(key.views) if split == "train" else 1)
        for start in range(0, count, rows)
    ]
