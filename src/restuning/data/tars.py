"""Images in tars, as webdataset writes them: read where they lie, in their order or in any other.

The standard library's tarfile reads them and not the package webdataset: that gives streams, from which no row can be
asked again, opens what a name says as a command (`pipe:`), and unpickles members that are called so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from restuning._errors import DataError
from restuning.data.data import (
    CACHED_PIXELS,
    SPLIT_SEED,
    Data,
    DataOptions,
    split_by_class,
)
from restuning.data.digests import Tell, quiet
from restuning.data.folders import MOST_CLASSES
from restuning.data.identity import Samples, describe_reading, label_digests
from restuning.data.labels import trim_labels, warn_of_untrained
from restuning.data.listing import CORRUPT, NO_IMAGE
from restuning.data.packed import PackedImages, refuse_changed
from restuning.data.remote import File
from restuning.data.shards import Shards
from restuning.data.tar_index import LABELS, Sample, TarIndex, index_tar, read_label

if TYPE_CHECKING:
    from restuning.backbones import Preprocessing

THREADS = 4
"""Tars that are looked through at once."""

GAP = 2**16
"""Bytes between two images that are read with them: a request for each would take longer."""

PIECE = 64 * 2**20
"""Bytes of images that are asked for at once."""

NAMED = 3
"""Samples that an error names."""


@dataclass(frozen=True)
class Members:
    """Images of several tars, one after the other; what is kept of each is 60 bytes and its key.

    Attributes:
        files: The tars.
        names: What each is called in ids.
        states: Of each when it was looked through.
        tars: Of each image the number of its tar.
        starts, sizes: Of each image, in bytes of its tar.
        digests: sha256 of each image, `n 32` bytes.
        labels: Class of each.
        keys: Of each tar the keys of its images with their endings, with zeros between them.
        firsts: Of each tar the number of its first image.
    """

    files: Sequence[File]
    names: Sequence[str]
    states: Sequence[list[Any]]
    tars: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    digests: np.ndarray
    labels: np.ndarray
    keys: Sequence[str]
    firsts: np.ndarray

    def member(self, row: int) -> str:
        """Key and ending of an image."""
        tar = int(self.tars[row])
        return _apart(self.keys[tar])[row - int(self.firsts[tar])]

    def id(self, row: int) -> str:
        """`shard/KEY`."""
        folder, slash, last = self.member(row).rpartition("/")
        return f"{self.names[int(self.tars[row])]}/{folder}{slash}{last.partition('.')[0]}"

    def shown(self, row: int) -> str:
        """What an error calls an image."""
        return f"{self.files[int(self.tars[row])]}, {self.member(row)}"


@lru_cache(maxsize=4)
def _apart(keys: str) -> list[str]:
    return keys.split("\0")


class TarImages(PackedImages):
    """Images in tars.

    Args:
        members: Of the tars.
        rows: Which of them, in order.
        transform: Image to tensor.
        keep: Keep transformed tensors in memory (only where the transform has no randomness).
    """

    def __init__(
        self,
        members: Members,
        rows: Sequence[int] | np.ndarray,
        transform: Callable[[Image.Image], Tensor],
        keep: bool = False,
    ) -> None:
        super().__init__(rows, transform, keep)
        self.members = members

    @property
    def ids(self) -> list[str]:
        """`shard/KEY` of each."""
        return [self.members.id(row) for row in self.rows.tolist()]

    def show(self, index: int) -> str:
        """Its tar and member."""
        return self.members.shown(int(self.rows[index]))

    def label(self, index: int) -> int:
        """As the tar has it."""
        return int(self.members.labels[self.rows[index]])

    def sample_digests(self, tell: Tell = quiet) -> Samples:
        """Those of the images' bytes, as they were when the tars were looked through."""
        inputs = [self.members.digests[row].tobytes() for row in self.rows.tolist()]
        self.forget_changed(inputs)
        labels = label_digests(self.members.labels[self.rows].tolist())
        return Samples(inputs, labels, describe_reading(self.transform))

    def check_unchanged(self, start: int = 0, stop: int | None = None) -> None:
        """Compare the tars of some images with what they were when they were looked through.

        Raises:
            DataError: One is another now.

        Cost: a `stat` a tar, or a request.
        """
        for tar in np.unique(self.members.tars[self.rows[start:stop]]).tolist():
            refuse_changed(self.members.files[tar], self.members.states[tar])

    def read_bytes(self, indices: Sequence[int]) -> list[bytes]:
        """Of several images, in the order asked for; neighbours in one reading."""
        members = self.members
        rows = [int(self.rows[i]) for i in indices]
        contents: dict[int, bytes] = {}
        for tar, start, stop, inside in _spans(members, sorted(set(rows))):
            whole = members.files[tar].read(start, stop)
            for row in inside:
                at = int(members.starts[row]) - start
                contents[row] = whole[at : at + int(members.sizes[row])]
        return [contents[row] for row in rows]


def _spans(members: Members, rows: Sequence[int]) -> list[tuple[int, int, int, list[int]]]:
    """Tar, first and last byte of what is read at once, and the images in it."""
    spans: list[tuple[int, int, int, list[int]]] = []
    for row in rows:
        tar, start = int(members.tars[row]), int(members.starts[row])
        stop = start + int(members.sizes[row])
        if spans:
            last = spans[-1]
            if last[0] == tar and 0 <= start - last[2] <= GAP and stop - last[1] <= PIECE:
                spans[-1] = (tar, last[1], stop, [*last[3], row])
                continue
        spans.append((tar, start, stop, [row]))
    return spans


def from_tars(shards: Shards, preprocessing: Preprocessing, options: DataOptions) -> Data:
    """Tars with an image and a label a sample; see `load_data`.

    A label is a number of a class or its name: of `KEY.cls`, else of the field `label` in `KEY.json`, else the text of
    `KEY.txt`; the first sample says which. With `label` another field of the JSON is taken, or the member that is called so.

    Raises:
        DataError: A tar is missing, damaged or no tar; samples without an image or a label (those without an image and
            corrupt ones are left out with `skip_bad`); labels that are no classes.

    Cost: the first time a pass over all bytes, later a `stat` a tar.
    """
    files = [file for several in shards.splits.values() for file in several]
    made = _Making(shards, options)
    for file, index in _look_through(files):
        made.add(file, index)
    members, names, left_out = made.finish()
    rows: dict[str, np.ndarray] = {}
    place = {file: n for n, file in enumerate(members.files)}
    for split, several in shards.splits.items():
        rows[split] = np.flatnonzero(np.isin(members.tars, [place[file] for file in several]))
    if options.skip_bad:
        before = set(members.labels.tolist())
        for split, at in rows.items():
            rows[split], bad = _drop_unreadable(members, at, preprocessing)
            left_out.setdefault(CORRUPT, []).extend(bad)
        kept = np.concatenate(list(rows.values()))
        if gone := sorted(before - set(members.labels[kept].tolist())):
            raise DataError(
                "classes whose images are all corrupt",
                where=shards.name,
                found=", ".join(names[y] for y in gone[:5]),
                fix="restore some, or take the classes out",
            )
    for split, at in rows.items():
        if not len(at):
            raise DataError(
                "a split without images",
                where=f"{shards.name}, {split}",
                fix="add a tar that has some",
            )
    if "whole" in rows:
        labels = members.labels[rows["whole"]].tolist()
        drawn = split_by_class(labels, (0.7, 0.1), SPLIT_SEED)
        rows = {s: rows["whole"][d] for s, d in zip(("train", "val", "test"), drawn, strict=True)}
    elif "test" not in rows and "val" not in rows:
        drawn = split_by_class(members.labels[rows["train"]].tolist(), (0.7, 0.1), SPLIT_SEED)
        rows = {s: rows["train"][d] for s, d in zip(("train", "val", "test"), drawn, strict=True)}
    trained = set(members.labels[rows["train"]].tolist())
    used = np.concatenate(list(rows.values()))
    extra = set(members.labels[used].tolist()) - trained
    if extra:
        raise DataError(
            "classes that training does not have",
            where=shards.name,
            found=", ".join(names[y] for y in sorted(extra)[:5]),
            fix="give them training images",
        )
    warn_of_untrained(names, trained, shards.name)
    train = rows["train"]
    if options.final and "val" in rows:
        train = np.concatenate([train, rows["val"]])
    plain = preprocessing.transform("none")

    values = 3 * math.prod(preprocessing.size)

    def read(at: np.ndarray, policy: str) -> TarImages:
        # All of them or none: of a long pass the first would only take memory.
        keep = policy == "none" and len(at) * values <= CACHED_PIXELS
        return TarImages(
            members, at, plain if policy == "none" else preprocessing.transform(policy), keep
        )

    def part(split: str) -> TarImages | None:
        at = rows.get(split)
        return read(at, "none") if at is not None and len(at) else None

    return Data(
        shards.name,
        read(train, options.augment),
        None if options.final else part("val"),
        part("test"),
        names,
        left_out={why: each for why, each in left_out.items() if each},
    )


def _look_through(files: Sequence[File]) -> Iterator[tuple[File, TarIndex]]:
    """Indexes of tars, some at once and few in memory: an index is much larger than what is kept of it."""
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(files), THREADS):
            several = files[start : start + THREADS]
            yield from zip(several, pool.map(index_tar, several), strict=True)


def _drop_unreadable(
    members: Members, rows: np.ndarray, preprocessing: Preprocessing
) -> tuple[np.ndarray, list[str]]:
    images = TarImages(members, rows, preprocessing.transform("none"))
    good, bad = [], []
    for index, row in enumerate(rows.tolist()):
        try:
            images.image(index)
        except DataError:
            bad.append(members.id(row))
            continue
        good.append(row)
    return np.asarray(good, np.int64), bad


class _Making:
    """Members of tars, added in their order."""

    def __init__(self, shards: Shards, options: DataOptions) -> None:
        self.shards, self.options = shards, options
        self.field = str(options.label)
        self.source = ""
        self.files: list[File] = []
        self.states: list[list[Any]] = []
        self.keys: list[str] = []
        self.firsts: list[int] = []
        self.columns: list[tuple[np.ndarray, ...]] = []
        self.labels: list[int | str] = []
        # Equal names are one object: there are few of many.
        self.words: dict[str, str] = {}
        self.first: dict[type, str] = {}
        self.left_out: dict[str, list[str]] = {}
        self.count = 0

    def add(self, file: File, index: TarIndex) -> None:
        name = self.shards.names[file]
        kept = []
        for sample in index.samples:
            if sample.image:
                kept.append(sample)
            elif self.options.skip_bad:
                self.left_out.setdefault(NO_IMAGE, []).append(f"{name}/{sample.key}")
            else:
                raise DataError(
                    "a sample without an image",
                    where=f"{file}, {sample.key}",
                    found=", ".join(f".{ending}" for ending in sample.labels),
                    fix="add KEY.jpg, KEY.png or KEY.webp, or leave such samples out with --skip-bad",
                )
        for sample in kept:
            self.labels.append(self._label(file, sample))
        number = len(self.files)
        self.files.append(file)
        self.states.append(index.state)
        self.firsts.append(self.count)
        self.count += len(kept)
        self.keys.append("\0".join(f"{sample.key}.{sample.image}" for sample in kept))
        digests = b"".join(bytes.fromhex(sample.sha256) for sample in kept)
        self.columns.append(
            (
                np.full(len(kept), number, np.int32),
                np.asarray([sample.start for sample in kept], np.int64),
                np.asarray([sample.size for sample in kept], np.int64),
                np.frombuffer(digests, np.uint8).reshape(-1, 32),
            )
        )

    def _label(self, file: File, sample: Sample) -> int | str:
        where = f"{file}, {sample.key}"
        self.source = self.source or self._choose(sample)
        field = "label" if self.field in LABELS else self.field
        try:
            label = read_label(sample.labels, self.source, field)
        except ValueError as error:
            raise DataError(
                "a label is no class",
                where=f"{where}.{self.source}",
                found=str(error)[:200],
                fix="write the number of a class from 0, or its name",
            ) from None
        if label is None:
            wanted = f"field {field} in .json" if self.source == "json" else f".{self.source}"
            raise DataError(
                "a sample without a label",
                where=where,
                found=f"no {wanted}; there are {', '.join(f'.{e}' for e in sample.labels) or 'no labels'}",
                fix="write KEY.cls with the number or the name of its class, or name a field of KEY.json with --label",
            )
        if type(label) is int and not 0 <= label < MOST_CLASSES:
            raise DataError(
                "a label is no number of a class",
                where=where,
                found=str(label),
                fix="number classes from 0",
            )
        self.first.setdefault(type(label), where)
        if len(self.first) > 1:
            raise DataError(
                "some labels are numbers and others are names",
                where=self.first[str],
                found=f"a name there, a number in {self.first[int]}",
                fix="write one or the other",
            )
        return self.words.setdefault(label, label) if isinstance(label, str) else label

    def _choose(self, sample: Sample) -> str:
        """Where labels are, by the first sample."""
        if self.field in LABELS:
            return self.field
        if self.field != DataOptions().label:
            return "json"
        if "cls" in sample.labels:
            return "cls"
        try:
            there = read_label(sample.labels, "json", self.field) is not None
        except ValueError:
            there = True
        return "json" if there or "txt" not in sample.labels else "txt"

    def finish(self) -> tuple[Members, list[str], dict[str, list[str]]]:
        """The members, names of classes, and what was left out."""
        if not self.count:
            raise DataError(
                "tars without images",
                where=self.shards.name,
                found=f"{len(self.files)} tars",
                fix="a sample is KEY.jpg, KEY.png or KEY.webp with KEY.cls, KEY.json or KEY.txt beside it",
            )
        names, numbers = self._classes()
        tars, starts, sizes, digests = (
            np.concatenate(column) for column in zip(*self.columns, strict=True)
        )
        members = Members(
            self.files,
            [self.shards.names[file] for file in self.files],
            self.states,
            tars,
            starts,
            sizes,
            digests,
            numbers,
            self.keys,
            np.asarray(self.firsts),
        )
        return members, names, self.left_out

    def _classes(self) -> tuple[list[str], np.ndarray]:
        where = self.shards.name
        if str in self.first:
            spelt = sorted(self.words)
            trimmed = dict(zip(spelt, trim_labels(spelt, where), strict=True))
            names = sorted(set(trimmed.values()), key=lambda y: (len(y), y))
            if self.source == "txt" and 2 * len(names) > self.count:
                raise DataError(
                    "texts beside the images are captions, not classes",
                    where=where,
                    found=f"{len(names):,} texts of {self.count:,} images",
                    fix="write KEY.cls with the number or the name of a class, or name a field of KEY.json with --label",
                )
            places = {y: n for n, y in enumerate(names)}
            numbers = np.asarray([places[trimmed[str(y)]] for y in self.labels], np.int64)
        else:
            numbers = np.asarray(self.labels, np.int64)
            names = [str(n) for n in range(int(numbers.max()) + 1)]
        if len(names) < 2:
            raise DataError(
                "a classification needs two classes",
                where=where,
                found=f"{len(names)}",
                fix="check the labels",
            )
        return names, numbers
