"""A store on disk: a manifest, labels and raw shards, each with its sha256.

A folder without a manifest is unfinished; one whose files do not match it is refused, never
repaired in silence and never used in part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from restuning._errors import StoreError
from restuning._files import cache_root, sha256_of_file
from restuning.data.data import name_of
from restuning.data.digests import digest_files
from restuning.data.parquet import find_parquets
from restuning.data.shards import find_shards
from restuning.features.codec import BYTES, decode, disk_type, read_array
from restuning.features.key import Column, StoreKey
from restuning.features.manifest import (
    KEY,
    MANIFEST,
    Shard,
    damaged,
    read_key,
    read_manifest,
)
from restuning.sites import Needs, count_taps

IN_MEMORY = 2 * 2**30
"""Decoded bytes of a split that are held in memory; above, rows are read from the files."""


def default_root() -> Path:
    """`$RESTUNING_CACHE`, else `~/.cache/restuning/features`."""
    return cache_root()


def stores(root: Path) -> list[Path]:
    """Folders of finished and unfinished stores."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if is_store(path))


def is_store(path: Path) -> bool:
    """Whether a folder says that it is a store, finished or not."""
    return path.is_dir() and any((path / name).exists() for name in (KEY, MANIFEST))


def find_store(name: str | Path, root: Path | None = None) -> Path:
    """A store by its folder, or by the start of its name.

    Raises:
        StoreError: None, or several.
    """
    if is_store(Path(name)):
        return Path(name)
    fits = [path for path in stores(root or default_root()) if path.name.startswith(str(name))]
    if len(fits) == 1:
        return fits[0]
    raise StoreError(
        "no such feature store" if not fits else "several feature stores fit",
        where=str(name),
        found=", ".join(path.name for path in fits[:4]),
        fix="`restuning cache ls` lists them",
    )


def list_of_data(name: str | Path, root: Path) -> dict[Path, StoreKey]:
    """Stores of data of a name, finished and not.

    Args:
        name: The data as `load_data` takes them, or the whole name of a store.
        root: Where stores lie.
    """
    shards = find_shards(name) or find_parquets(name)
    label = shards.name if shards else name_of(Path(str(name).partition(":")[2] or name))
    found: dict[Path, StoreKey] = {}
    for path in stores(root):
        with suppress(StoreError):
            key = read_key(path)
            if key.data["name"] == label or path.name == str(name):
                found[path] = key
    return found


class Store:
    """A finished store, opened for reading.

    Args:
        path: Its folder.
        verify: Compare the contents of every file with the manifest now (False: for who only reads
            what the manifest says).

    Attributes:
        key: What its values depend on.
        columns: What is read of a row, in order: all of it, or what `only` was asked for.
        form: Which tokens are read, as `Needs.form`.
        holds_splits: Whether splits of up to `IN_MEMORY` are held in memory once they were read; see `read_from_files`.
        manifest: The whole manifest, with the error report of its dtype.

    Raises:
        StoreError: No store, unfinished, of another schema, or it is not what was written: a file
            is missing, a link, of another size or of other contents.

    Cost: one `stat` a file; a file that nobody has verified since it was written is read once,
    about 1 s a gigabyte (`digest_files`, which remembers it from process to process).
    """

    def __init__(self, path: str | Path, *, verify: bool = True) -> None:
        self.path = Path(path)
        read = read_manifest(self.path)
        self.manifest, self.key = read.content, read.key
        self._shards, self._labels, self._files = read.shards, read.labels, read.files
        if verify:
            self._compare(digest_files([self.path / name for name in self._files]))
        self._read_only(self.key.columns, self.key.form)

    def _read_only(self, columns: Mapping[str, Column], form: str) -> None:
        self.columns, self.form = dict(columns), form
        runs: list[slice] = []
        for column in self.columns.values():
            stop = column.start + column.numel
            if runs and runs[-1].stop == column.start:
                runs[-1] = slice(runs[-1].start, stop)
            else:
                runs.append(slice(column.start, stop))
        self._runs = runs
        self._in_memory: dict[tuple[str, int], Tensor] = {}
        self._maps: dict[str, tuple[np.ndarray, Any]] = {}
        self.holds_splits = True

    def only(self, needs: Needs, last: str = "") -> Store:
        """The same store, of which no more is read and held in memory than is needed.

        Args:
            needs: Of a task.
            last: Name of the last tap, which needs may call "last".

        Raises:
            StoreError: It lacks some of it.
        """
        columns = self.key.find(needs, last)
        if columns is None:
            raise lacks(self.path, self.key, needs)
        # By hand: copying it by `copy` would open the folder again.
        narrow = object.__new__(Store)
        narrow.__dict__ |= self.__dict__
        # Of all tokens the store's own form: it may keep patches pooled.
        narrow._read_only(columns, self.key.form if needs.tokens == "all" else needs.form)
        return narrow

    @property
    def values_per_row(self) -> int:
        """Values that are read of one input."""
        return sum(column.numel for column in self.columns.values())

    def bytes_in_memory(self, split: str) -> int:
        """What the memory holds of a split in one view while its rows are read in any order.

        Decoded up to `IN_MEMORY`; above, its part of the files, whose pages the system keeps while there is room.
        """
        values = self.key.splits[split] * self.values_per_row
        decoded = 4 * values
        return decoded if decoded <= IN_MEMORY else BYTES[self.key.dtype] * values

    def read_from_files(self) -> None:
        """Let go of splits that are held in memory, and hold none from now on."""
        self.holds_splits = False
        self._in_memory.clear()

    @property
    def bytes(self) -> int:
        """Bytes of all shards."""
        return sum(file.bytes for file in self._files.values())

    def verify(self) -> int:
        """Read every file, whoever read it before, and compare its sha256; returns their number.

        Raises:
            StoreError: One differs, or is not there.
        """
        digests = []
        for name in self._files:
            with self._explained(self.path / name):
                digests.append(sha256_of_file(self.path / name))
        self._compare(digests)
        return len(self._files)

    def _compare(self, digests: Sequence[str | None]) -> None:
        for file, digest in zip(self._files.values(), digests, strict=True):
            place = self.path / file.name
            with self._explained(place):
                if digest is None:
                    raise ValueError("it cannot be read")
                if digest != file.sha256:
                    raise ValueError("its contents do not match their sha256")

    def digest(self, split: str) -> str:
        """sha256 over the features of a split, of all its views, 64 hexadecimal digits."""
        shards = [s for (name, _), part in self._shards.items() if name == split for s in part]
        files = [self._files[n].sha256 for shard in shards for n in shard.sizes(self.key)]
        return hashlib.sha256("".join(files).encode()).hexdigest()

    def labels(self, split: str) -> Tensor:
        """Labels of a split, `n`.

        Raises:
            StoreError: They are not as they were written.
        """
        place = self.path / self._labels[split].name
        with self._explained(place):
            labels = read_array(place, np.int64, (self.key.splits[split],))
        if (labels < 0).any():
            raise damaged(place, f"a class of number {labels.min()}")
        return torch.from_numpy(labels)

    def rows(self, split: str, view: int, indices: Sequence[int] | Tensor) -> Tensor:
        """Rows of a split in fp32, `len(indices) r`, in the order asked for.

        Raises:
            StoreError: A file is gone, or a value is not finite.
        """
        whole = self._in_memory.get((split, view))
        size = self.key.splits[split] * self.values_per_row * 4
        if whole is None and self.holds_splits and size <= IN_MEMORY:
            parts = [self._decode(shard) for shard in self._shards[(split, view)]]
            whole = torch.cat(parts) if parts else torch.empty(0, self.values_per_row)
            self._refuse_not_finite(whole)
            self._in_memory[(split, view)] = whole
        at = torch.as_tensor(indices, dtype=torch.long)
        if whole is not None:
            return whole.index_select(0, at)
        rows = self._read(split, view, at.numpy())
        self._refuse_not_finite(rows)
        return rows

    def _refuse_not_finite(self, rows: Tensor) -> None:
        # A sum tells at a tenth of the cost; one that grew beyond fp32 is looked at closely.
        if not rows.sum().isfinite() and not rows.isfinite().all():
            raise damaged(self.path, "values that are NaN or infinite")

    def taps(self, rows: Tensor) -> dict[str, Tensor]:
        """Rows as taps, `b r` to `b n d` each (views, no copies)."""
        columns = self.columns.values()
        parts = rows.split([column.numel for column in columns], 1)
        return {
            name: part.unflatten(1, column.shape)
            for name, column, part in zip(self.columns, columns, parts, strict=True)
        }

    def _read(self, split: str, view: int, at: np.ndarray) -> Tensor:
        """Rows from the files, one copy each: shards are small, a batch meets most of them."""
        shards = self._shards[(split, view)]
        starts = np.array([shard.start for shard in shards])
        which = np.searchsorted(starts, at, side="right") - 1
        shards_open = {number: self._open(shards[number]) for number in set(which.tolist())}
        raw = np.empty((len(at), self.values_per_row), disk_type(self.key.dtype))
        places = zip(which.tolist(), (at - starts[which]).tolist(), strict=True)
        for place, (shard, row) in enumerate(places):
            raw[place] = self._pick(shards_open[shard][0][row])
        scales = None
        if self.key.dtype == "int8":
            scales = np.stack([self._pick(shards_open[shard][1]) for shard in which.tolist()])
        return decode(raw, self.key.dtype, scales)

    def _decode(self, shard: Shard) -> Tensor:
        raw, scales = self._open(shard)
        scales = None if scales is None else self._pick(scales)
        return decode(np.array(self._pick(raw)), self.key.dtype, scales)

    def _pick(self, values: np.ndarray) -> np.ndarray:
        """What is read of rows, or of one."""
        if len(self._runs) == 1:
            return values[..., self._runs[0]]
        return np.concatenate([values[..., run] for run in self._runs], -1)

    def _open(self, shard: Shard) -> tuple[np.ndarray, Any]:
        """A shard's memory map and its scales, opened once."""
        if shard.name not in self._maps:
            width = self.key.values_per_row
            file, *more = (self.path / name for name in shard.sizes(self.key))
            with self._explained(file):
                kind, shape = disk_type(self.key.dtype), (shard.stop - shard.start, width)
                raw = read_array(file, kind, shape, mapped=True)
                scales = read_array(more[0], np.float32, (width,)) if more else None
            self._maps[shard.name] = raw, scales
        return self._maps[shard.name]

    @contextmanager
    def _explained(self, file: Path) -> Iterator[None]:
        """What a file that cannot be read, or is not what it was, means."""
        try:
            yield
        except (OSError, ValueError) as error:
            found = getattr(error, "strerror", None) or str(error)
            if not file.exists():
                found = "it is gone: the store was removed while it was read"
            raise damaged(file, found) from None

    def __reduce__(self) -> tuple:
        """A worker process opens the folder itself."""
        return _reopen, (
            self.path,
            self.key.digest,
            self.columns,
            self.form,
            self.holds_splits,
        )


def lacks(path: Path, key: StoreKey, needs: Needs) -> StoreError:
    """The error for a store that has not all that is needed."""
    return StoreError(
        "the store lacks what the task needs",
        where=str(path),
        found=f"{count_taps([tap.name for tap in key.taps])}, tokens {key.form}; wanted "
        f"{', '.join(needs.taps[:4])}{' ...' if len(needs.taps) > 4 else ''}, tokens {needs.form}",
        fix="build one for this method: `restuning cache`",
    )


def _reopen(
    path: Path, digest: str, columns: Mapping[str, Column], form: str, holds_splits: bool
) -> Store:
    # Its contents were compared in the process that sent it here.
    store = Store(path, verify=False)
    if store.key.digest != digest:
        raise damaged(path, "another store has taken its place")
    store._read_only(columns, form)
    store.holds_splits = holds_splits
    return store
