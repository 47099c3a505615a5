"""Build a store: every shard written whole, claimed by one process, never computed twice."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from restuning._errors import StoreError
from restuning._files import Claim, write_bytes
from restuning.bypass.pooling import measure_pooling_loss
from restuning.features.key import StoreKey, pool_taps
from restuning.features.manifest import KEY, MANIFEST, Shard, read_entry, read_key
from restuning.features.store import Store
from restuning.features.writing import (
    Lost,
    explain_write_errors,
    finish,
    is_written,
    write_shard,
)
from restuning.host import Extractor
from restuning.runtime.processes import is_main_process
from restuning.sites import Needs, is_stream

SHARD_BYTES = 64 * 2**20
SHARD_ROWS = 512
"""The most a killed process loses: 512 forwards, about a minute of one CPU core on ViT-S."""


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
    workers: int = 0,
    collate: Callable | None = None,
    progress: bool = True,
    check: Callable[[str, int, int], None] = lambda split, start, stop: None,
    lent: Mapping[str, Store] = MappingProxyType({}),
) -> Store:
    """Compute what is missing of a store and open it.

    Several processes may run this at once on one folder: each shard is claimed by one of them.
    A process that dies gives its claim back; its unfinished shard is computed again.

    Args:
        host: The frozen backbone.
        key: Of the store.
        root: Where stores lie; the store is `root/DATA-DIGEST`.
        splits: Data sets of `(input, label)` by split and number of the view.
        batch_size: Inputs of one forward.
        workers: Processes that read and decode inputs.
        collate: Samples to a batch.
        progress: A bar on a terminal.
        check: Called with a split and a range of its inputs when they were read, before their
            features are kept; raises where they are no longer those of the key.
        lent: Stores that hold some splits already, by split: those are copied, and no forward is made.

    Raises:
        StoreError: The disk is full or cannot be written, features are not finite, or the folder
            holds another store. Shards that were finished stay.
    """
    folder = place(root, key)
    if (folder / MANIFEST).exists():
        return open_finished(folder, key)
    _prepare(folder, key)
    plan = _plan(key, batch_size)
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
        TextColumn("features"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not (progress and console.is_terminal and is_main_process()),
    )
    with bar:
        line = bar.add_task("", total=key.rows, completed=key.rows - missing)
        advance = partial(bar.advance, line)
        writer = _Writer(host, key, folder, batch_size, workers, collate, advance, check)
        # First what nobody has claimed, then what others had claimed and may have left behind.
        for wait in (False, True):
            for (split, view), dataset in splits.items():
                shards = [s for s in plan if (s.split, s.view) == (split, view)]
                if split in lent:
                    writer.copy(shards, lent[split], wait)
                else:
                    writer.write(shards, dataset, wait)
    # One of several writers finishes; the others find the manifest there.
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
    return open_finished(folder, key)


def place(root: Path, key: StoreKey) -> Path:
    """The folder of a store."""
    return Path(root) / f"{key.data['name']}-{key.digest[:12]}"


def compute_taps(host: Extractor, key: StoreKey, *inputs: Any) -> Mapping[str, Tensor]:
    """The taps of one batch (a tensor, or a mapping by keyword) that a store keeps, not pooled yet."""
    device = host.device.type
    with torch.autocast(device, torch.bfloat16, enabled=key.precision == "bf16"):
        if inputs and isinstance(inputs[0], Mapping):
            return host.features(keep=_needs(key), **inputs[0])
        return host.features(*inputs, keep=_needs(key))


def _needs(key: StoreKey) -> Needs:
    # A forward gives whole patches; they are pooled after it.
    return replace(key.needs, pool_patches=1)


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


def _prepare(folder: Path, key: StoreKey) -> None:
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(folder / KEY):
            _refuse_other(folder, read_key(folder), key)
        else:
            write_bytes(folder / KEY, json.dumps(key.to_dict(), indent=1).encode())


def _plan(key: StoreKey, batch_size: int) -> list[Shard]:
    rows = max(1, min(SHARD_ROWS, SHARD_BYTES // max(1, key.bytes_per_row)))
    # Whole batches, so that a shard's values do not depend on who computes it.
    rows = max(batch_size, rows // batch_size * batch_size)
    return [
        Shard(split, view, start, min(start + rows, count))
        for split, count in key.splits.items()
        for view in range(len(key.views) if split == "train" else 1)
        for start in range(0, count, rows)
    ]


@dataclass(frozen=True)
class _Writer:
    """Computes shards and writes them, each claimed by one process.

    Attributes:
        host, key: What is computed.
        folder: Of the store.
        batch_size, workers, collate: As for `build`.
        advance: Receives the number of rows that were computed.
        check: As for `build`.
    """

    host: Extractor
    key: StoreKey
    folder: Path
    batch_size: int
    workers: int
    collate: Callable | None
    advance: Callable[[int], None]
    check: Callable[[str, int, int], None]

    def copy(self, shards: list[Shard], store: Store, wait: bool) -> None:
        """Take the shards that nobody has written or claimed from a store of the same values."""
        store = store.only(self.key.needs)
        for shard in shards:
            claim = self._claim(shard, wait)
            if claim is None:
                continue
            try:
                at = range(shard.start, shard.stop)
                rows = store.rows(shard.split, shard.view, at)
                labels = store.labels(shard.split)[shard.start : shard.stop].tolist()
                write_shard(self.folder, self.key, shard, rows, labels)
                self.advance(len(at))
            finally:
                claim.give_back()

    def write(self, shards: list[Shard], dataset: Any, wait: bool) -> None:
        """Compute the shards that nobody has written or claimed; `wait` for claims of others."""
        claims: dict[Shard, Claim] = {}
        # What the loader was asked for and has not given yet: shard and row behind each batch.
        queue: list[tuple[Shard, int]] = []
        loader = DataLoader(
            dataset,
            # A generator as sampler: torch's signature says it wants more than it uses.
            batch_sampler=cast(Any, self._batches(shards, wait, claims, queue)),
            num_workers=self.workers,
            collate_fn=self.collate,
            generator=torch.Generator().manual_seed(0),
        )
        parts: list[Tensor] = []
        labels: list[int] = []
        lost: Lost = {}
        last = self.host.sites.taps[-1]
        try:
            for inputs, answers in loader:
                shard, stop = queue.pop(0)
                taps = self._taps(inputs)
                if self.key.pool_patches > 1:
                    _count(lost, taps, self.key, last)
                parts.append(_row(pool_taps(taps, self.key.pool_patches, last), self.key))
                labels += [int(y) for y in answers]
                self.advance(len(answers))
                if stop == shard.stop:
                    self.check(shard.split, shard.start, shard.stop)
                    write_shard(self.folder, self.key, shard, torch.cat(parts), labels, lost)
                    claims.pop(shard).give_back()
                    parts, labels, lost = [], [], {}
        finally:
            for claim in claims.values():
                claim.give_back()

    def _batches(
        self,
        shards: list[Shard],
        wait: bool,
        claims: dict[Shard, Claim],
        queue: list[tuple[Shard, int]],
    ) -> Iterator[list[int]]:
        # The loader asks a little ahead of the forwards, so claims are few and short.
        for shard in shards:
            claim = self._claim(shard, wait)
            if claim is None:
                continue
            claims[shard] = claim
            for start in range(shard.start, shard.stop, self.batch_size):
                stop = min(start + self.batch_size, shard.stop)
                queue.append((shard, stop))
                yield list(range(start, stop))

    def _claim(self, shard: Shard, wait: bool) -> Claim | None:
        """A shard that is not written yet; None where it is, or is another's."""
        if is_written(self.folder, shard):
            return None
        claim = Claim.take(self.folder / f"{shard.name}.lock", wait=wait)
        # Its owner may have finished while we waited.
        if claim is not None and is_written(self.folder, shard):
            claim.give_back()
            return None
        return claim

    def _taps(self, inputs: Any) -> Mapping[str, Tensor]:
        device = self.host.device
        if isinstance(inputs, Mapping):
            named = {k: v.to(device) for k, v in inputs.items()}
            return compute_taps(self.host, self.key, named)
        return compute_taps(self.host, self.key, inputs.to(device))


def _count(lost: Lost, taps: Mapping[str, Tensor], key: StoreKey, last: str) -> None:
    """Add what merging takes from a batch."""
    for tap in key.taps:
        if tap.name != last and is_stream(tap.name):
            before, now = (
                lost.get(tap.name, (0.0, 0.0)),
                measure_pooling_loss(taps[tap.name], key.pool_patches),
            )
            lost[tap.name] = (before[0] + now[0], before[1] + now[1])


def _row(taps: Mapping[str, Tensor], key: StoreKey) -> Tensor:
    for tap in key.taps:
        if tuple(taps[tap.name].shape[1:]) != tap.shape:
            raise StoreError(
                "inputs of different sizes cannot share a store",
                where=tap.name,
                found=f"{tuple(taps[tap.name].shape[1:])}, first was {tap.shape}",
                fix="store class tokens only, or train live (--no-cache)",
            )
    return torch.cat([taps[t.name].flatten(1) for t in key.taps], 1).float().cpu()
