"""Shards computed: a loader's batches through the backbone, rows of them into files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from restuning._errors import StoreError
from restuning._files import Claim
from restuning.bypass.pooling import measure_pooling_loss
from restuning.data.loader import Loader
from restuning.features.key import StoreKey, pool_taps
from restuning.features.manifest import Shard
from restuning.features.stages import Stages, TimedBatch, TimedInputs, choose_workers
from restuning.features.store import Store
from restuning.features.writing import Lost, is_written, write_shard
from restuning.host import Extractor
from restuning.sites import Needs, is_stream


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


@dataclass(frozen=True)
class Writer:
    """Computes shards and writes them, each claimed by one process.

    Attributes:
        host, key: What is computed.
        folder: Of the store.
        batch_size, workers, collate: As for `build`.
        advance: Receives the number of rows that were computed, and where the time went.
        check: As for `build`.
        stages: Where time is added up.
        claimed: Whether others may write the same shards meanwhile, so that each is claimed first.
        written: Receives each shard that is whole now.
        together: The backbone is shared out among processes: each of them makes every forward, and the first
            one writes. The shards are then those that all have agreed on.
    """

    host: Extractor
    key: StoreKey
    folder: Path
    batch_size: int
    workers: int | None
    collate: Callable | None
    advance: Callable[[int, Stages], None]
    check: Callable[[str, int, int], None]
    stages: Stages
    claimed: bool
    written: Callable[[Shard], None] = lambda shard: None
    together: bool = False

    def copy(self, shards: list[Shard], store: Store, wait: bool) -> None:
        """Take the shards that nobody has written or claimed from a store of the same values."""
        store = store.only(self.key.needs)
        for shard in shards:
            claim = self._claim(shard, wait)
            if claim is None:
                continue
            try:
                at = range(shard.start, shard.stop)
                with self.stages.timed("write"):
                    rows = store.rows(shard.split, shard.view, at)
                    labels = store.labels(shard.split)[shard.start : shard.stop].tolist()
                    write_shard(self.folder, self.key, shard, rows, labels)
                self.advance(len(at), self.stages)
            finally:
                claim.give_back()

    def write(self, shards: list[Shard], dataset: Any, wait: bool) -> None:
        """Compute the shards that nobody has written or claimed; `wait` for claims of others."""
        written = not self.together and all(is_written(self.folder, shard) for shard in shards)
        if written or not shards:
            # No loader processes are started for nothing.
            return
        claims: dict[Shard, Claim] = {}
        # What the loader was asked for and has not given yet: shard and row behind each batch.
        queue: list[tuple[Shard, int]] = []
        workers = self.workers
        if workers is None:
            workers = choose_workers(dataset, self.batch_size)
        loader = Loader(
            TimedInputs(dataset),
            TimedBatch(self.collate),
            batch_sampler=self._batches(shards, wait, claims, queue),
            num_workers=workers,
            # What lies in pages that do not move is copied to the device while the main process goes on.
            pin_memory=self.host.device.type == "cuda",
            generator=torch.Generator().manual_seed(0),
        )
        parts: list[Tensor] = []
        labels: list[int] = []
        lost: Lost = {}
        last, stages = self.host.sites.taps[-1], self.stages
        stages.workers = max(stages.workers, workers)
        batches = iter(loader)
        try:
            while True:
                with stages.timed("wait"):
                    batch = next(batches, None)
                if batch is None:
                    break
                (inputs, answers), read, decode = batch
                shard, stop = queue.pop(0)
                with stages.timed("forward"):
                    taps = self._taps(inputs)
                    if self.key.pool_patches > 1:
                        _count(lost, taps, self.key, last)
                    parts.append(_row(pool_taps(taps, self.key.pool_patches, last), self.key))
                labels += [int(y) for y in answers]
                stages.rows += len(answers)
                stages.read += read
                stages.decode += decode
                self.advance(len(answers), stages)
                if stop == shard.stop:
                    self.check(shard.split, shard.start, shard.stop)
                    if not self.together or torch.distributed.get_rank() == 0:
                        with stages.timed("write"):
                            write_shard(
                                self.folder, self.key, shard, torch.cat(parts), labels, lost
                            )
                        self.written(shard)
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
        if self.together:
            return Claim(None)
        if is_written(self.folder, shard):
            return None
        if not self.claimed:
            return Claim(None)
        claim = Claim.take(self.folder / f"{shard.name}.lock", wait=wait)
        # Its owner may have finished while we waited.
        if claim is not None and is_written(self.folder, shard):
            claim.give_back()
            return None
        return claim

    def _taps(self, inputs: Any) -> Mapping[str, Tensor]:
        device = self.host.device
        if isinstance(inputs, Mapping):
            named = {k: v.to(device, non_blocking=True) for k, v in inputs.items()}
            return compute_taps(self.host, self.key, named)
        return compute_taps(self.host, self.key, inputs.to(device, non_blocking=True))


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
