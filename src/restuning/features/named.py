"""Stores of data and backbones by name: built at once, or one worker's share of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from restuning._errors import StoreError
from restuning.backbones import Backbone
from restuning.data import Data, DataOptions, load_data
from restuning.features.compute import Writer
from restuning.features.extract import (
    count_missing,
    cut,
    open_finished,
    place,
    prepare,
    shard_rows,
    show_progress,
)
from restuning.features.manifest import KEY, MANIFEST
from restuning.features.opened import open_backbone
from restuning.features.share import Share, begin_share, end_share
from restuning.features.stages import Stages
from restuning.features.stored import (
    Stored,
    StoreOptions,
    Work,
    can_be_stored,
    choose_pool,
    describe_key,
    open_or_build,
    read_by_methods,
    taps_to_store,
)
from restuning.host import Extractor
from restuning.runtime.processes import count_processes
from restuning.sites import IN_WORDS, Needs, resolve_tokens

USUAL = StoreOptions()


def build_store(
    data: str | Path,
    backbone: str | Backbone = "restuning-tiny",
    *,
    weights: str | Path | None = None,
    random: bool = False,
    tokens: str = "auto",
    device: str | torch.device | None = None,
    options: StoreOptions = USUAL,
    reading: DataOptions | None = None,
) -> Stored:
    """Build a store of a data set for many methods, or go on with one: all that `restuning cache` does.

    Args:
        data: As `load_data` takes it.
        backbone: By name (see `load_backbone`), or one that is loaded.
        weights: File of its weights, without a hub.
        random: Random weights of the backbone, from seed 0.
        tokens: What is kept: "auto" (what methods read that read one token a tap, or nothing but
            parts; "all" where the readout reads all tokens of images); "cls", "last" or "pool" of
            every tap; "all" (all tokens, and the parts that methods read), "all/2" (patches two by two).
        device: "cpu", "cuda", "cuda:1"; None for CUDA if it is there.
        options: Where the store lies, how it is computed and kept.
        reading: How the data set is read; None for the defaults of `DataOptions`.

    Raises:
        StoreError: No such tokens, tokens that cannot be stored, the store would be larger than
            `options.limit`, or it cannot be written.
        RestuningError: Names, data, weights or the device are not what they should be.
    """
    with _opened(data, backbone, weights, random, tokens, device, options, reading) as opened:
        stored = open_or_build(
            *(opened.host, opened.backbone, opened.data, opened.needs, options),
            augmented=opened.augmented,
        )
    if stored is None:
        raise _too_large(opened.data, options)
    if stored.stages is not None:
        options.log(f"time  {stored.stages}")
    last = opened.host.sites.taps[-1]
    held = [name for name, one in opened.read.items() if stored.store.key.find(one, last)]
    options.log(f"serves  {', '.join(held) or 'no method by its name (--tokens auto does)'}")
    return stored


@dataclass(frozen=True)
class WrittenShare:
    """What one worker has done of a store.

    Attributes:
        path: The store's folder; it is finished by `merge_shares`, or was already.
        share: Which of how many.
        rows: Inputs of its share, in all views.
        stages: Where the time of what it computed now went.
    """

    path: Path
    share: Share
    rows: int
    stages: Stages


def write_share(
    data: str | Path,
    backbone: str | Backbone = "restuning-tiny",
    share: str | Share = "1/1",
    *,
    weights: str | Path | None = None,
    random: bool = False,
    tokens: str = "auto",
    device: str | torch.device | None = None,
    options: StoreOptions = USUAL,
    reading: DataOptions | None = None,
) -> WrittenShare:
    """Write one worker's share of a store: all that `restuning cache --shard` does.

    Which shards are its own follows from its number alone: no lock is taken, and none of the other
    workers need run at the same time, on the same machine or into the same folder. Run again it
    computes what is missing of its share. `merge_shares` makes the store of all of them, byte for
    byte the one that `build_store` makes.

    Args:
        data, backbone, weights, random, tokens, device, options, reading: As for `build_store`, and
            the same for all workers.
        share: "3/8" for the third of eight.

    Raises:
        StoreError: As `build_store`; or workers of another count, batch size, shard size or of
            another store have written into the folder.
        RestuningError: As `build_store`.

    Cost: its share of the forwards; and, as every worker must know that its data are those of the
        others, a pass over the bytes of all data (about 1 s a gigabyte, remembered on the machine).
    """
    share = share if isinstance(share, Share) else Share.parse(share)
    if count_processes() > 1:
        raise StoreError(
            "a launcher's processes share a store by themselves",
            found=f"--shard {share} in one of {count_processes()} processes",
            fix="leave --shard out, or start each worker by itself",
        )
    with _opened(data, backbone, weights, random, tokens, device, options, reading) as opened:
        host = opened.host
        work = Work.of(host, opened.backbone, opened.data, opened.needs, options, opened.augmented)
        if options.limit is not None and work.key.rows * work.key.bytes_per_row > options.limit:
            raise _too_large(opened.data, options)
        return _write_share(host, work, share, options)


def _write_share(host: Extractor, work: Work, share: Share, options: StoreOptions) -> WrittenShare:
    key, folder, stages = work.key, place(options.folder, work.key), Stages()
    away, name = options.away, folder.name
    if away is not None and MANIFEST in away.list_files().get(name, ()):
        away.fetch(name)
    size = shard_rows(key, options.batch_size, options.shard_bytes)
    plan = cut(key, size)
    own = share.pick(plan)
    rows = sum(shard.stop - shard.start for shard in own)
    if (folder / MANIFEST).exists():
        store = open_finished(folder, key)
        options.log(f"nothing to do: {store.path} is whole")
        return WrittenShare(folder, share, rows, stages)
    prepare(folder, key)
    if away is not None:
        away.fetch_marks(name)
    mark = begin_share(folder, key, share, options.batch_size, size)
    if away is not None:
        away.put(name, [KEY, share.file])
        away.fetch_shards(name, key, own)
    missing = count_missing(folder, key, own)
    options.log(
        f"{describe_key(key)}: share {share}, {len(own):,} of {len(plan):,} shards, {missing:,} forwards "
        f"to make, into {folder}"
    )
    if not own:
        options.log(
            "this worker has none: fewer workers, or a smaller --shard-size, share it better"
        )
    with show_progress(rows, rows - missing, options.progress) as shown:
        writer = Writer(
            *(host, key, folder, options.batch_size, options.workers, work.collate),
            *(shown, work.check, stages),
            claimed=False,
            written=lambda shard: None if away is None else away.put_shard(name, key, shard),
        )
        for (split, view), dataset in work.parts.items():
            writer.write([s for s in own if (s.split, s.view) == (split, view)], dataset, False)
    end_share(folder, mark, own)
    if away is not None:
        away.put_missing(name, key, own)
        away.put(name, [share.file])
    options.log(f"time  {stages}")
    return WrittenShare(folder, share, rows, stages)


@dataclass(frozen=True)
class _Opened:
    """Data and backbone of a store, and what is to be kept of them."""

    host: Extractor
    backbone: Backbone
    data: Data
    needs: Needs
    read: Mapping[str, Needs]
    augmented: Any


@contextmanager
def _opened(
    data: str | Path,
    backbone: str | Backbone,
    weights: str | Path | None,
    random: bool,
    tokens: str,
    device: str | torch.device | None,
    options: StoreOptions,
    reading: DataOptions | None,
) -> Iterator[_Opened]:
    """Inside, the device is the current one."""
    reading = reading or DataOptions()
    if not _are_tokens(tokens):
        raise StoreError(
            "no such tokens",
            found=tokens,
            fix="give auto, cls, last, pool, all, or all/2 for patches two by two",
        )
    with open_backbone(backbone, weights, random, device) as (host, loaded):
        augmented = None
        if options.views > 2:
            augmented = load_data(data, loaded, replace(reading, augment="timm")).train
        plain = load_data(data, loaded, replace(reading, augment="none", final=False))
        options.log(f"data  {plain.describe()}")
        pool = choose_pool(loaded, plain) or host.readout_rule.pool
        read = read_by_methods(host, pool)
        needs = _parse_needs(host, tokens, pool, read)
        if not can_be_stored(plain, needs):
            raise StoreError(
                "texts have different lengths, so all their tokens cannot be stored",
                where=plain.name,
                fix="give --tokens cls or last, or train live",
            )
        yield _Opened(host, loaded, plain, needs, read, augmented)


def _too_large(data: Data, options: StoreOptions) -> StoreError:
    return StoreError(
        "the store would be larger than its limit",
        where=data.name,
        found=f"a limit of {options.limit:,} bytes",
        fix="raise `limit`, or keep less: one token a tap, or another dtype",
    )


def _are_tokens(tokens: str) -> bool:
    kind, slash, side = tokens.partition("/")
    pooled = kind == "all" and side.isdigit() and int(side) > 0
    return pooled if slash else kind in ("auto", *IN_WORDS)


def _parse_needs(host: Extractor, tokens: str, pool: str, read: Mapping[str, Needs]) -> Needs:
    """What `auto`, `cls`, ... `all/2` stand for, where methods of that readout read `read`."""
    small = [needs for needs in read.values() if needs.tokens != "all"]
    # Where the readout takes all tokens of an image so does the bypass of the paper, and they can be stored.
    if tokens == "auto" and small and not (host.images and resolve_tokens(pool) == "all"):
        return taps_to_store(host, *small)
    kind, _, side = ("all" if tokens == "auto" else tokens).partition("/")
    taps = Needs(host.sites.taps, kind, int(side or 1))  # type: ignore[arg-type]
    if kind != "all":
        return taps
    # What is made of all tokens is small beside them.
    return taps_to_store(host, taps, *(needs for needs in small if needs.tokens != "pool"))
