"""Find or build the store of a data set, where training from it is exact."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from restuning._errors import StoreError
from restuning.backbones import Backbone, choose_device, load_backbone, refuse_for_loaded
from restuning.data import Data, DataOptions, load_data
from restuning.data.data import collate_batch
from restuning.data.identity import Watch
from restuning.features.cached import StoredFeatures
from restuning.features.extract import build, forecast, open_finished, place
from restuning.features.key import DataKey, StoreKey, store_key
from restuning.features.manifest import MANIFEST, damaged
from restuning.features.store import Store, default_root, stores
from restuning.features.views import view_names, view_of
from restuning.host import Extractor
from restuning.sites import FEATURE, IN_WORDS, Needs, count_taps, covers_tokens, resolve_tokens
from restuning.task import Task

BY_ITSELF = 4 * 2**30
"""Bytes up to which training builds a store unasked: all tokens of 2000 ViT-S images."""

VIEWS_OF = {"none": 1, "flip": 2}
"""Augmentations that a store repeats exactly, and how many views they are."""


@dataclass(frozen=True)
class StoreOptions:
    """Where stores lie and how their values are computed and kept.

    Attributes:
        root: Folder of all stores; None for the usual one (`default_root`).
        dtype: How values are kept: "fp32", "bf16", "fp16" or "int8" (fp32: training is then exact).
        precision: What the backbone computes them in: "fp32" or "bf16".
        views: Of the training split that are stored: 1 the image, 2 its mirror image as well, more
            random crops.
        batch_size: Inputs of one forward while a store is built.
        workers: Processes that read inputs meanwhile; 0 reads in this one.
        limit: Bytes above which no store is built; None for no limit.
        progress: A bar on a terminal while a store is built.
        log: Receives a line for each store that is opened or built.
    """

    root: str | Path | None = None
    dtype: str = "fp32"
    precision: str = "fp32"
    views: int = 1
    batch_size: int = 32
    workers: int = 0
    limit: int | None = None
    progress: bool = True
    log: Callable[[str], None] = lambda line: None

    @property
    def folder(self) -> Path:
        """Of all stores."""
        return default_root() if self.root is None else Path(self.root)


@dataclass(frozen=True)
class Stored:
    """An opened store and how it came about.

    Attributes:
        store: Opened.
        seconds: Spent on building it now; 0 if it was there.
        views: Of the training split that are drawn from.
    """

    store: Store
    seconds: float
    views: int

    def data(self, data: Data, *, final: bool) -> Data:
        """The same data set, with the splits that it has, and stored features in place of inputs.

        Raises:
            StoreError: A stored label is of a class that the data set does not have.
        """
        # Of its own: the store may be that of a data set that has more splits.
        there = {name for name in self.store.key.splits if getattr(data, name) is not None}
        train = ("train", "val") if final and "val" in there else ("train",)

        def read(splits: Sequence[str], views: int = 1) -> StoredFeatures:
            rows = StoredFeatures(self.store, splits, views)
            if len(rows) and int(rows.labels.max()) >= len(data.labels):
                found = f"class {int(rows.labels.max())}, and {data.name} has {len(data.labels)}"
                raise damaged(self.store.path, found)
            return rows

        def split(name: str) -> StoredFeatures | None:
            return read([name]) if name in there else None

        return Data(
            data.name,
            read(train, self.views),
            None if final else split("val"),
            split("test"),
            data.labels,
            data.kind,
            collate_batch,
            data.left_out,
            notes=data.notes,
        )


def reason_not_storable(task: Task, augment: str) -> str:
    """Why a task cannot train from a store exactly; empty if it can."""
    if task.side is None and (task.inline_tuners or len(task.weights)):
        return "its tuners are inside the backbone"
    if augment not in VIEWS_OF:
        return f"--augment {augment} draws new images every epoch (`cache --views` keeps some)"
    return ""


def taps_to_store(host: Extractor, needs: Needs) -> Needs:
    """What to store: every tap where that is one token each, so that methods share a store."""
    more = [name for name in needs.taps if name != "last" and name not in host.sites.taps]
    return (
        Needs((*host.sites.taps, *more), needs.tokens)
        if needs.tokens != "all"
        else Needs(
            tuple(host.sites.taps[-1] if t == "last" else t for t in needs.taps),
            "all",
            needs.pool_patches,
        )
    )


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
    if data.kind != "image" and needs.tokens == "all":
        return None
    root, log = options.folder, options.log
    splits = {"train": data.train, "val": data.val, "test": data.test}
    splits = {name: split for name, split in splits.items() if split is not None}
    # Before contents are looked at: what is read later must be what the key says.
    watches = {name: Watch(split) for name, split in splits.items()}
    key = key_for(host, backbone, data, taps_to_store(host, needs), options)
    store = _find_covering(root, key)
    if store is not None:
        log(f"{_describe(store.key)}: reused {store.path}")
        return Stored(store, 0.0, options.views)
    for path in _find_of_before(root, key):
        log(
            f"{path} may be of these data: it is of before data were known by their contents, and "
            "cannot be told from one of other data; built again (`restuning cache rm` frees its room)"
        )
    size = key.rows * key.bytes_per_row
    if options.limit is not None and size > options.limit:
        log(f"not stored: {size / 2**30:.1f} GiB (`restuning cache` builds it)")
        return None
    example = backbone.kwargs or backbone.example
    log(
        f"{_describe(key)}: building {place(root, key)}: "
        f"{forecast(host, key, root, example, options.batch_size)}"
    )
    started = time.perf_counter()
    parts: dict[tuple[str, int], Any] = {
        ("train", number): view_of(view, data.train, augmented)
        for number, view in enumerate(key.views)
    }
    parts |= {(name, 0): split for name, split in splits.items() if name != "train"}
    store = build(
        host,
        key,
        root,
        parts,
        batch_size=options.batch_size,
        workers=options.workers,
        collate=data.collate,
        progress=options.progress,
        check=lambda split, start, stop: watches[split].check(start, stop),
    )
    if shares := store.manifest.get("merged away"):
        log(
            f"merged away: {min(shares.values()):.0%} to {max(shares.values()):.0%} of the variance of "
            "patches inside an image, by tap"
        )
    return Stored(store, time.perf_counter() - started, options.views)


def build_store(
    data: str | Path,
    backbone: str | Backbone = "restuning-tiny",
    *,
    weights: str | Path | None = None,
    random: bool = False,
    tokens: str = "auto",
    device: str | torch.device | None = None,
    options: StoreOptions = StoreOptions(),
    reading: DataOptions | None = None,
) -> Stored:
    """Build a store of all taps of a data set, or go on with one: all that `restuning cache` does.

    Args:
        data: As `load_data` takes it.
        backbone: By name (see `load_backbone`), or one that is loaded.
        weights: File of its weights, without a hub.
        random: Random weights of the backbone, from seed 0.
        tokens: What is kept of each tap: "auto" (what the readout needs), "cls", "last", "pool",
            "all", or "all/2" for patches two by two.
        device: "cpu", "cuda", "cuda:1"; None for CUDA if it is there.
        options: Where the store lies, how it is computed and kept.
        reading: How the data set is read; None for the defaults of `DataOptions`.

    Raises:
        StoreError: No such tokens, tokens that cannot be stored, or the store cannot be written.
        RestuningError: Names, data, weights or the device are not what they should be.
    """
    reading = reading or DataOptions()
    torch.manual_seed(0)
    if isinstance(backbone, Backbone):
        refuse_for_loaded(backbone, weights=weights, random=random)
    else:
        file = None if weights is None else Path(weights)
        backbone = load_backbone(backbone, weights=file, random=random)
    host = backbone.host()
    needs = _parse_needs(host, tokens)
    augmented = None
    if options.views > 2:
        augmented = load_data(data, backbone, replace(reading, augment="timm")).train
    place = choose_device(device)
    # Kernels without a device of their own, as of quantised weights, go to the current one.
    with torch.cuda.device(place) if place.type == "cuda" else nullcontext():
        host.to(place)
        plain = load_data(data, backbone, replace(reading, augment="none", final=False))
        options.log(f"data  {plain.describe()}")
        stored = open_or_build(host, backbone, plain, needs, options, augmented=augmented)
    if stored is None:
        raise StoreError(
            "texts have different lengths, so all their tokens cannot be stored",
            where=plain.name,
            fix="give --tokens cls or last, or train live",
        )
    return stored


def _parse_needs(host: Extractor, tokens: str) -> Needs:
    """Every tap, with the tokens that `auto`, `cls`, ... `all/2` stand for."""
    if tokens == "auto":
        tokens = resolve_tokens(host.readout_rule.pool)
        if tokens == "all" and not host.images:
            # Texts differ in length: what their tokens say together does not, and is small.
            parts = (f"{tap}/tokens" for tap in host.sites.taps)
            return Needs((*host.sites.taps, *parts, f"{FEATURE}/mean"), "cls")
    kind, slash, side = tokens.partition("/")
    if kind not in IN_WORDS or (slash and not (kind == "all" and side.isdigit() and int(side))):
        raise StoreError(
            "no such tokens",
            found=tokens,
            fix="give auto, cls, last, pool, all, or all/2 for patches two by two",
        )
    return Needs(host.sites.taps, kind, int(side) if slash else 1)  # type: ignore[arg-type]


def _describe(key: StoreKey) -> str:
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


def _find_covering(root: Path, key: StoreKey) -> Store | None:
    """A finished store with at least these taps, tokens and views, kept the same way."""
    exact = place(root, key)
    if (exact / MANIFEST).exists():
        return open_finished(exact, key)
    wide = {tap.name for tap in key.taps}
    for path in stores(root):
        try:
            # Only what it says of itself: there may be many.
            store = Store(path, verify=False)
        except StoreError:
            continue
        theirs = store.key
        # As they are written: one that was read has lists where another has tuples.
        written, wanted = theirs.to_dict(), key.to_dict()
        same = all(
            written[f] == wanted[f] for f in ("backbone", "dtype", "precision", "preprocessing")
        )
        same = same and theirs.covers_data(key) and key.splits.items() <= theirs.splits.items()
        enough = wide <= {t.name for t in theirs.taps} and covers_tokens(
            theirs.tokens, key.tokens, theirs.pool_patches, key.pool_patches
        )
        if same and enough and theirs.views[: len(key.views)] == key.views:
            return Store(path)
    return None
