"""Find or build the store of a data set, where training from it is exact."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from restuning import methods
from restuning._errors import EngineError, RestuningError, StoreError
from restuning.backbones import Backbone
from restuning.data import AudioBatch, Data
from restuning.data.data import collate_batch
from restuning.data.identity import Watch
from restuning.data.remote import show_url
from restuning.data.targets import WithoutTargets, for_store, stack_targets
from restuning.features.away import Away
from restuning.features.cached import StoredFeatures
from restuning.features.codec import BYTES
from restuning.features.extract import (
    build,
    forecast,
    open_finished,
    place,
)
from restuning.features.key import DataKey, StoreKey, measure_taps, store_key
from restuning.features.manifest import MANIFEST, damaged
from restuning.features.stages import Stages
from restuning.features.store import Store, default_root, stores
from restuning.features.views import view_names, view_of
from restuning.host import Extractor
from restuning.runtime.free_memory import read_free_memory
from restuning.runtime.processes import is_main_process
from restuning.runtime.randomness import preserve_randomness
from restuning.sites import IN_WORDS, Needs, count_taps, is_stream, unite_needs
from restuning.task import Task

BY_ITSELF = 4 * 2**30
"""Bytes up to which training builds a store unasked: all tokens of 2000 ViT-S images."""

VIEWS_OF = {"none": 1, "flip": 2}
"""Augmentations that a store repeats exactly, and how many views they are."""


@dataclass(frozen=True)
class StoreOptions:
    """Where stores lie and how their values are computed and kept.

    Attributes:
        root: Folder of all stores, or the URL of one; None for the usual one (`default_root`).
        dtype: How values are kept: "fp32", "bf16", "fp16" or "int8" (fp32: training is then exact).
        precision: What the backbone computes them in: "fp32" or "bf16".
        views: Of the training split that are stored: 1 the image, 2 its mirror image as well, more
            random crops.
        batch_size: Inputs of one forward while a store is built.
        workers: Processes that read and decode inputs meanwhile; 0 does it in this one, None takes as
            many as cores but one where that is worth it (`choose_workers`).
        limit: Bytes above which no store is built; None for no limit.
        progress: A bar on a terminal while a store is built.
        log: Receives a line for each store that is opened or built.
        shard_bytes: Of one file of values; None for at most 64 MiB and 512 inputs, and 256 MB of a store of more than 1,000
            such files.
        memory: Bytes that rows may take in the memory of a process that trains from a store; None for what is free. More
            are gone through in portions (`StoredFeatures.hold`).
    """

    root: str | Path | None = None
    dtype: str = "fp32"
    precision: str = "fp32"
    views: int = 1
    batch_size: int = 32
    workers: int | None = 0
    limit: int | None = None
    progress: bool = True
    log: Callable[[str], None] = lambda line: None
    shard_bytes: int | None = None
    memory: int | None = None

    @property
    def away(self) -> Away | None:
        """Where they lie at a URL."""
        return Away.of(self.root)

    @property
    def folder(self) -> Path:
        """Of all stores; of those at a URL, in which they are read and written here."""
        if (away := self.away) is not None:
            return away.root
        return default_root() if self.root is None else Path(self.root)


@dataclass(frozen=True)
class Stored:
    """An opened store and how it came about.

    Attributes:
        store: Opened.
        seconds: Spent on building it now; 0 if it was there.
        views: Of the training split that are drawn from.
        stages: Where the time of building it went; None if it was there.
        at_once: Training rows that are held in memory at a time, of a store that is larger; None of one that fits.
    """

    store: Store
    seconds: float
    views: int
    stages: Stages | None = None
    at_once: int | None = None

    @classmethod
    def opened(
        cls, store: Store, options: StoreOptions, seconds: float = 0.0, stages: Stages | None = None
    ) -> Stored:
        """A store that a run reads, and how much of it is held at a time.

        Args:
            store: Of which no more is read than is needed.
            options: Views, memory, and who is told where the store is larger.
            seconds, stages: Of building it.
        """
        limit = read_free_memory() if options.memory is None else options.memory
        views = options.views
        size = sum(
            store.bytes_in_memory(split) * (views if split == "train" else 1)
            for split in store.key.splits
        )
        if limit is None or size <= limit:
            return cls(store, seconds, views, stages)
        # A run that was told nothing needs room for other things as well.
        room = limit if options.memory is not None else limit // 2
        at_once = room // (4 * store.values_per_row * views)
        options.log(
            f"larger than memory: {size / 2**20:,.1f} MiB, {limit / 2**20:,.1f} MiB "
            f"{'allowed' if options.memory is not None else 'free'}: trained from in portions of {at_once:,} rows"
        )
        store.read_from_files()
        return cls(store, seconds, views, stages, at_once)

    def data(self, data: Data, *, final: bool) -> Data:
        """The same data set, with the splits that it has, and stored features in place of inputs.

        Raises:
            StoreError: A stored label is of a class that the data set does not have.
        """
        # Of its own: the store may be that of a data set that has more splits.
        there = {name for name in self.store.key.splits if getattr(data, name) is not None}
        train = ("train", "val") if final and "val" in there else ("train",)

        def read(
            splits: Sequence[str], views: int = 1, at_once: int | None = None
        ) -> StoredFeatures:
            if data.beside:
                targets = torch.cat([stack_targets(getattr(data, name)) for name in splits])
                data.problem.check_targets(targets, data.num_classes)
                mirror = data.problem.mirror
                return StoredFeatures(self.store, splits, views, targets, mirror, at_once)
            rows = StoredFeatures(self.store, splits, views, at_once=at_once)
            if len(rows) and int(rows.labels.max()) >= len(data.labels):
                found = f"class {int(rows.labels.max())}, and {data.name} has {len(data.labels)}"
                raise damaged(self.store.path, found)
            return rows

        def split(name: str) -> StoredFeatures | None:
            return read([name]) if name in there else None

        return Data(
            data.name,
            read(train, self.views, self.at_once),
            None if final else split("val"),
            split("test"),
            data.labels,
            data.kind,
            collate_batch,
            data.left_out,
            notes=data.notes,
            problem=data.problem,
            beside=data.beside,
        )


def reason_not_storable(task: Any, augment: str) -> str:
    """Why a task cannot train from a store exactly; empty if it can."""
    if not isinstance(task, Task):
        # A rival of another kind, which reads images itself.
        return "it is no task on features of the backbone"
    if task.side is None and (task.inline_tuners or len(task.weights)):
        return "its tuners are inside the backbone"
    if augment not in VIEWS_OF:
        return f"--augment {augment} draws new images every epoch (`cache --views` keeps some)"
    return ""


def taps_to_store(host: Extractor, *several: Needs) -> Needs:
    """What to store for the needs of some tasks, by the backbone's own names of taps; see `unite_needs`."""
    return unite_needs(several, host.sites.taps)


def key_for(
    host: Extractor,
    backbone: Backbone,
    data: Data,
    needs: Needs,
    options: StoreOptions = StoreOptions(),
) -> StoreKey:
    """The key of the store of these features.

    Cost: as `store_key`, and of the data a pass over their bytes (`identify`).
    """
    data = for_store(data)
    splits = {
        name: len(split)
        for name, split in (("train", data.train), ("val", data.val), ("test", data.test))
        if split is not None
    }
    description = data.notes.get("preprocessing") or (
        backbone.preprocessing.to_dict() if backbone.preprocessing else {"kind": "text"}
    )
    return store_key(
        host,
        needs,
        backbone.kwargs or backbone.example,
        DataKey(
            data.name,
            data.contents(options.log),
            splits,
            description,
            view_names(options.views),
        ),
        backbone=backbone.name,
        dtype=options.dtype,
        precision=options.precision,
    )


def open_or_build(
    host: Extractor,
    backbone: Backbone,
    data: Data,
    needs: Needs,
    options: StoreOptions = StoreOptions(),
    *,
    augmented: Any = None,
) -> Stored | None:
    """Open a store that covers what is needed, or build it.

    Args:
        host: The frozen backbone.
        backbone: What it was made of.
        data: The data set, without augmentation, its splits apart.
        needs: Of the task.
        options: Where the store lies, how it is computed and kept.
        augmented: The training data with random augmentation, for views beyond two.

    Returns:
        The store; None where there is none and it would be larger than `options.limit`, or where
        inputs of different lengths cannot be stored (all tokens of texts).

    Raises:
        StoreError: It cannot be built, or one that is there is damaged.
    """
    if not can_be_stored(data, needs):
        return None
    work = Work.of(host, backbone, data, needs, options, augmented)
    root, log, key, away = options.folder, options.log, work.key, options.away
    store = _find_covering(root, key)
    if store is None and away is not None:
        away.fetch_covering(lambda theirs: _covers(theirs, key, key.needs))
        store = _find_covering(root, key)
    if store is not None:
        if away is not None:
            _put(away, store)
        log(f"{describe_key(store.key)}: reused {_where(away, store.path)}")
        return Stored.opened(store.only(key.needs), options)
    for path in _find_of_before(root, key):
        log(
            f"{path} may be of these data: it is of before data were known by their contents, and "
            "cannot be told from one of other data; built again (`restuning cache rm` frees its room)"
        )
    size = key.rows * key.bytes_per_row
    if options.limit is not None and size > options.limit:
        log(f"not stored: {size / 2**30:.1f} GiB (`restuning cache` builds it)")
        return None
    lent = _find_lent(root, key)
    example = backbone.kwargs or backbone.example
    foretold = forecast(host, key, root, example, options.batch_size, lent)
    copied = f"; {' and '.join(lent)} from a store that is there" if lent else ""
    log(f"{describe_key(key)}: building {_where(away, place(root, key))}: {foretold}{copied}")
    started, stages = time.perf_counter(), Stages()
    store = build(
        host,
        key,
        root,
        work.parts,
        batch_size=options.batch_size,
        workers=options.workers,
        collate=work.collate,
        progress=options.progress,
        check=work.check,
        lent=lent,
        shard_bytes=options.shard_bytes,
        stages=stages,
    )
    if away is not None:
        _put(away, store)
    if shares := store.manifest.get("merged away"):
        log(
            f"merged away: {min(shares.values()):.0%} to {max(shares.values()):.0%} of the variance of "
            "patches inside an image, by tap"
        )
    seconds = time.perf_counter() - started
    return Stored.opened(store.only(key.needs), options, seconds, stages)


@dataclass(frozen=True)
class Work:
    """A store that is to be: its key, what is read for it, and what compares that with the key."""

    key: StoreKey
    parts: Mapping[tuple[str, int], Any]
    collate: Any
    check: Callable[[str, int, int], None]

    @classmethod
    def of(
        cls,
        host: Extractor,
        backbone: Backbone,
        data: Data,
        needs: Needs,
        options: StoreOptions,
        augmented: Any,
    ) -> Work:
        """Arguments as for `open_or_build`."""
        if data.beside and augmented is not None:
            augmented = WithoutTargets(augmented)
        data = for_store(data)
        host.resolve_needs(needs)
        splits = {"train": data.train, "val": data.val, "test": data.test}
        splits = {name: split for name, split in splits.items() if split is not None}
        # Before contents are looked at: what is read later must be what the key says.
        watches = {name: Watch(split) for name, split in splits.items()}
        key = key_for(host, backbone, data, taps_to_store(host, needs), options)
        parts: dict[tuple[str, int], Any] = {
            ("train", number): view_of(view, data.train, augmented)
            for number, view in enumerate(key.views)
        }
        parts |= {(name, 0): split for name, split in splits.items() if name != "train"}

        def check(split: str, start: int, stop: int) -> None:
            watches[split].check(start, stop)

        return cls(key, parts, data.collate, check)


def store_once(
    host: Extractor,
    backbone: Backbone,
    data: Data,
    several: Iterable[Needs],
    options: StoreOptions = StoreOptions(),
) -> None:
    """Make one pass over a data set for all that several tasks read and no store holds yet.

    `open_or_build` then finds for each what it needs. What cannot be stored is left out; so is, largest
    first, what would make the store larger than `options.limit`.

    Args:
        host: The frozen backbone.
        backbone: What it was made of.
        data: The data set, without augmentation, its splits apart.
        several: Needs of the tasks.
        options: Where the store lies, how it is computed and kept.

    Raises:
        StoreError: It cannot be built, or one that is there is damaged.
    """
    wanted = []
    for needs in dict.fromkeys(several):
        with suppress(EngineError):
            # Who reads it is told; here it must not keep others from theirs.
            host.resolve_needs(needs)
            wanted += [taps_to_store(host, needs)] if can_be_stored(data, needs) else []
    if len(wanted) < 2:
        # What one reads it stores by itself.
        return
    example = backbone.kwargs or backbone.example
    key = key_for(host, backbone, data, wanted[0], options)
    if (away := options.away) is not None:
        for one in wanted:
            if _find_covering(options.folder, key, one) is None:
                away.fetch_covering(lambda theirs, one=one: _covers(theirs, key, one))
    wanted = [n for n in wanted if _find_covering(options.folder, key, n) is None]
    # One forward does not give both.
    for pooled in (False, True):
        group = [n for n in wanted if (n.tokens == "pool") == pooled]
        while len(group) > 1:
            united = taps_to_store(host, *group)
            size = sum(tap.numel for tap in measure_taps(host, united, example))
            if options.limit is None or size * BYTES[key.dtype] * key.rows <= options.limit:
                open_or_build(host, backbone, data, united, options)
                break
            group.remove(max(group, key=_weigh))


def _weigh(needs: Needs) -> tuple[bool, float]:
    return needs.tokens == "all", len(needs.taps) / needs.pool_patches**2


def can_be_stored(data: Data, needs: Needs) -> bool:
    """Whether all inputs have rows of one length."""
    # Texts differ in length; so do sounds, but where a backbone makes all of them one length.
    fixed = isinstance(data.collate, AudioBatch) and not data.collate.audio.has_mask
    return (
        data.kind == "image"
        or fixed
        or needs.tokens != "all"
        or not any(map(is_stream, needs.taps))
    )


def choose_pool(backbone: Backbone, data: Data) -> str | None:
    """The readout that data ask for; None for the one that was found in the backbone."""
    # Where every word or place is answered; else its one vector is what the authors make of it.
    return data.problem.pool or backbone.pool


def read_by_methods(host: Extractor, pool: str) -> dict[str, Needs]:
    """What each method that trains from stored features reads of a backbone, by its name.

    Args:
        host: The frozen backbone.
        pool: Readout of all of them, one of `POOLS`.
    """
    found = {}
    for name in methods.names():
        # A backbone may have no place for a method, and an engine not what it reads.
        with suppress(RestuningError), preserve_randomness(devices=False):
            if not methods.runs_inside(name):
                task = methods.build(name, host, num_classes=2, pool=pool)
                needs = task.needs(host.readout_rule)
                host.resolve_needs(needs)
                found[name] = needs
    return found


def _put(away: Away, store: Store) -> None:
    if is_main_process():
        away.put_finished(store.path.name)


def _where(away: Away | None, path: Path) -> str:
    """A store's place as a log says it."""
    return str(path) if away is None else f"{show_url(away.url)}/{path.name} (by way of {path})"


def describe_key(key: StoreKey) -> str:
    """What a store of that key keeps, in one line."""
    views = f", {len(key.views)} views" if len(key.views) > 1 else ""
    merging = (
        ""
        if key.pool_patches == 1
        else f" (patches {key.pool_patches} x {key.pool_patches} together)"
    )
    computed = "" if key.precision == "fp32" else f" (computed in {key.precision})"
    taps = count_taps([tap.name for tap in key.taps])
    return (
        f"{taps}, {IN_WORDS[key.tokens]}{merging}, {key.dtype}{computed}{views}, "
        f"{key.bytes_per_row:,} bytes an input"
    )


def _find_of_before(root: Path, key: StoreKey) -> list[Path]:
    """Finished stores of data of this name on this backbone that do not say what the data contain."""
    found = []
    for path in stores(root):
        with suppress(StoreError):
            theirs = Store(path, verify=False).key
            same = (theirs.data.get("name"), theirs.backbone) == (key.data["name"], key.backbone)
            if same and theirs.splits == key.splits and not theirs.known_by_contents:
                found.append(path)
    return found


def _find_covering(root: Path, key: StoreKey, needs: Needs | None = None) -> Store | None:
    """A finished store with at least what is needed, of these data and views, kept the same way.

    Args:
        root: Folder of all stores.
        key: Of a store of the data.
        needs: What is needed; None for all that the key names.
    """
    needs = key.needs if needs is None else needs
    exact = place(root, key)
    if (exact / MANIFEST).exists() and key.find(needs) is not None:
        return open_finished(exact, key)
    for path in stores(root):
        try:
            # Only what it says of itself: there may be many.
            theirs = Store(path, verify=False).key
        except StoreError:
            continue
        if _covers(theirs, key, needs):
            return Store(path)
    return None


def _covers(theirs: StoreKey, key: StoreKey, needs: Needs) -> bool:
    """Whether a store has what is needed, of these data and views on this backbone, computed and kept the same way."""
    # As they are written: one that was read has lists where another has tuples.
    written, wanted = theirs.to_dict(), key.to_dict()
    return (
        all(written[f] == wanted[f] for f in ("backbone", "dtype", "precision", "preprocessing"))
        and theirs.covers_data(key)
        and key.splits.items() <= theirs.splits.items()
        and theirs.views[: len(key.views)] == key.views
        and theirs.find(needs) is not None
    )


def _find_lent(root: Path, key: StoreKey) -> dict[str, Store]:
    """By split, finished stores that hold these values of it, where none holds those of all splits."""
    # What int8 keeps depends on the rows beside; what rounding and what pooling take is counted in a forward.
    if key.dtype != "fp32" or key.pool_patches > 1:
        return {}
    apart = {split: key.restrict(split) for split in key.splits}
    found = {split: _find_covering(root, one) for split, one in apart.items()}
    return {split: store for split, store in found.items() if store is not None}
