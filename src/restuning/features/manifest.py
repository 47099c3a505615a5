"""What a store's folder says of itself, read without trust: its key, its shards and its manifest."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from restuning._errors import FormatError, StoreError
from restuning._files import read_json
from restuning.features.key import SCHEMA, StoreKey

MANIFEST = "manifest.json"
MARKS = "share.*-of-*.json"
"""What workers leave that write a share of a store each; see `share.py`."""

KEY = "key.json"
REBUILD = "remove it (`restuning cache rm`) and build it again: nothing of it is used"

HEADER = 4096
"""The most bytes in front of the values of a NumPy file; there are 128."""


@dataclass(frozen=True)
class Shard:
    """A range of one split in one view."""

    split: str
    view: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """Of its files, without suffix."""
        return f"{self.split}.{self.view}.{self.start:08d}"

    def sizes(self, key: StoreKey) -> dict[str, int]:
        """Bytes of the values in each of its files, by name."""
        sizes = {f"{self.name}.npy": (self.stop - self.start) * key.bytes_per_row}
        if key.dtype == "int8":
            sizes[f"{self.name}.scales.npy"] = key.values_per_row * 4
        return sizes


@dataclass(frozen=True)
class StoredFile:
    """A file of a store as the manifest remembers it."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The manifest of a finished store, every field of it checked.

    Attributes:
        content: As it was read.
        key: What the values depend on.
        shards: By split and view, in order and without gaps.
        labels: File by split.
        files: All of them by name, each there and of its size.
    """

    content: dict[str, Any]
    key: StoreKey
    shards: Mapping[tuple[str, int], list[Shard]]
    labels: Mapping[str, StoredFile]
    files: Mapping[str, StoredFile]


def read_manifest(folder: Path, *, whole: bool = True) -> Manifest:
    """The manifest of a finished store; its files are there and of their sizes, and are not read.

    Args:
        folder: Of the store.
        whole: False where its files are still to come.

    Raises:
        StoreError: No store, unfinished, of another schema, or not as it was written.

    Cost: one `stat` a file.
    """
    file = folder / MANIFEST
    if not os.path.lexists(file):
        unfinished = (folder / KEY).exists()
        raise StoreError(
            "an unfinished feature store" if unfinished else "no feature store",
            where=str(folder),
            fix="run the same `restuning cache` again: it goes on at the shard where it was"
            if unfinished
            else "`restuning cache DATA` builds one, `restuning cache ls` lists them",
        )
    content = read_content(file)
    try:
        key = _check_key(content["key"], file)
        raw = json.dumps(content["key"], sort_keys=True).encode()
        if hashlib.sha256(raw).hexdigest() != content["digest"]:
            raise ValueError("its key does not match its digest")
        shards, files = _check_shards(key, content["shards"])
        _check_cover(key, shards)
        if content["labels"].keys() != key.splits.keys():
            raise ValueError("labels of other splits")
        labels = {
            split: _check_file(content["labels"][split], f"{split}.labels.npy", 8 * count)
            for split, count in key.splits.items()
        }
        _check_figures(content, key)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise damaged(file, f"{type(error).__name__}: {error}") from None
    files |= {each.name: each for each in labels.values()}
    for each in files.values() if whole else ():
        _check_size(folder / each.name, each.bytes)
    return Manifest(content, key, shards, labels, files)


def read_key(folder: Path) -> StoreKey:
    """The key that an unfinished store was begun with.

    Raises:
        StoreError: There is none, or it cannot be read.
    """
    file = folder / KEY
    content = read_content(file)
    try:
        return _check_key(content, file)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise damaged(file, f"{type(error).__name__}: {error}") from None


def read_entry(folder: Path, key: StoreKey, shard: Shard) -> dict[str, Any]:
    """What was written beside a shard that is whole: its files, labels and losses.

    Raises:
        StoreError: It is not as it was written, or its files are not.
    """
    file = folder / f"{shard.name}.json"
    content = read_content(file)
    try:
        there, files = _check_shards(key, [content])
        if there[(shard.split, shard.view)] != [shard]:
            raise _other_batches(file, there[(shard.split, shard.view)][0].stop, shard.stop)
        labels = content["labels"]
        if len(labels) != shard.stop - shard.start or not all(map(_is_count, labels)):
            raise ValueError("labels that do not fit")
        _check_errors(content["error"], key, may_lack=key.dtype == "fp32")
        for lost in content["lost"].values():
            if len(lost) != 2 or not all(map(_is_number, lost)):
                raise ValueError("losses that do not fit")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise damaged(file, f"{type(error).__name__}: {error}") from None
    for each in files.values():
        _check_size(folder / each.name, each.bytes)
    return content


def read_content(file: Path, *, sealed: bool = False) -> dict[str, Any]:
    """What a file of JSON in a store's folder says, nothing of it checked but its seal, which may be wanted.

    Raises:
        StoreError: It cannot be read, or is a link.
    """
    if file.is_symlink():
        raise damaged(file, "a link, which may lead out of the folder")
    try:
        return read_json(file, sealed=sealed)
    except FormatError as error:
        raise damaged(file, error.found) from None


def damaged(file: Path, found: str) -> StoreError:
    """The error for a file of a store that is not as it was written."""
    return StoreError("a feature store is damaged", where=str(file), found=found, fix=REBUILD)


def _check_key(raw: Any, file: Path) -> StoreKey:
    if raw["schema"] != SCHEMA:
        raise StoreError(
            "a store of another schema",
            where=str(file),
            found=f"{str(raw['schema'])[:40]}, we read {SCHEMA}",
            fix="remove it (`restuning cache rm`) and build it again",
        )
    try:
        key = StoreKey.from_dict(raw)
    except StoreError as error:
        raise ValueError(f"{error.what}: {error.found}") from None
    # Written again it must be what was read: no number as a text, nothing left out, nothing more.
    if key.to_dict() != raw:
        raise ValueError("a key that is not written so")
    counts = [*key.splits.values(), *(n for tap in key.taps for n in tap.shape)]
    named = [key.data["name"], key.backbone["name"]]
    if (
        not all(map(_is_count, counts))
        or not all(isinstance(name, str) for name in named)
        # A text in stores of before data were known by their contents.
        or not (isinstance(key.data["identity"], str) or key.known_by_contents)
        # They are names of files.
        or not all(re.fullmatch(r"\w[\w-]{0,63}", split) for split in key.splits)
        or key.values_per_row < 1
        or len({tap.name for tap in key.taps}) < len(key.taps)
        or key.views[:1] != ("plain",)
    ):
        raise ValueError("a key of sizes or names that no store has")
    return key


def _other_batches(file: Path, there: int, wanted: int) -> StoreError:
    return StoreError(
        "this store was begun with another batch size or size of shards",
        where=str(file),
        found=f"a shard that ends at row {there}, where one would end at {wanted} now",
        fix="give the --batch-size and --shard-size of then, or remove it (`restuning cache rm`) and begin again",
    )


def _check_shards(
    key: StoreKey, entries: Any
) -> tuple[dict[tuple[str, int], list[Shard]], dict[str, StoredFile]]:
    """Shards by split and view, and their files by name."""
    shards: dict[tuple[str, int], list[Shard]] = {}
    files: dict[str, StoredFile] = {}
    for entry in entries:
        shard = Shard(entry["split"], entry["view"], entry["start"], entry["stop"])
        if not all(map(_is_count, (shard.view, shard.start, shard.stop))):
            raise ValueError("a shard of no rows")
        shards.setdefault((shard.split, shard.view), []).append(shard)
        sizes = shard.sizes(key)
        if len(entry["files"]) != len(sizes):
            raise ValueError(f"{shard.name}: {len(entry['files'])} files")
        for file, (name, size) in zip(entry["files"], sizes.items(), strict=True):
            files[name] = _check_file(file, name, size)
    return shards, files


def _check_cover(key: StoreKey, shards: dict[tuple[str, int], list[Shard]]) -> None:
    """Every split in every view once, from its first row to its last."""
    for split, count in key.splits.items():
        for view in range(len(key.views) if split == "train" else 1):
            stop = 0
            for shard in shards.get((split, view), []):
                if shard.start != stop or shard.stop <= stop:
                    raise ValueError(f"{shard.name}: rows that are missing, or there twice")
                stop = shard.stop
            if stop != count:
                raise ValueError(f"{stop} rows of {split} in view {view}, its key says {count}")
            # A split without rows has no shards.
            shards.setdefault((split, view), [])
    if len(shards) != sum(len(key.views) if s == "train" else 1 for s in key.splits):
        raise ValueError("shards of a split or view that its key does not know")


def _check_file(entry: Any, name: str, size: int) -> StoredFile:
    file = StoredFile(entry["file"], entry["bytes"], entry["sha256"])
    # A name that is not the shard's own could lead out of the folder.
    if file.name != name:
        raise ValueError(f"{str(file.name)[:80]!a} where {name} belongs")
    if not _is_count(file.bytes) or not size <= file.bytes <= size + HEADER:
        raise ValueError(f"{name}: {file.bytes!r:.40} bytes, its values take {size}")
    if not isinstance(file.sha256, str) or not re.fullmatch("[0-9a-f]{64}", file.sha256):
        raise ValueError(f"{name}: no sha256")
    return file


def _check_figures(content: Mapping[str, Any], key: StoreKey) -> None:
    _check_errors(content["error"], key)
    shares = content.get("merged away", {})
    if not shares.keys() <= key.slices.keys() or not all(map(_is_number, shares.values())):
        raise ValueError("shares that do not fit")


def _check_errors(errors: Any, key: StoreKey, may_lack: bool = False) -> None:
    if may_lack and not errors:
        return
    if errors.keys() != key.slices.keys() or not all(
        map(_is_number, (e[kind] for e in errors.values() for kind in ("largest", "relative")))
    ):
        raise ValueError("errors that do not fit")


def _check_size(file: Path, size: int) -> None:
    # Sizes tell a truncated copy at once; contents are compared before they are used.
    try:
        about = file.lstat()
    except OSError as error:
        raise damaged(file, f"it is missing ({error.strerror})") from None
    if not stat.S_ISREG(about.st_mode):
        raise damaged(file, "no file, but a link or something else")
    if about.st_size != size:
        raise damaged(file, f"{about.st_size} bytes, written were {size}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
