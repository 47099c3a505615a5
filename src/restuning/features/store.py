"""A store on disk: a manifest, labels and raw shards, each with its sha256.

A folder without a manifest is unfinished; one whose files do not match it is refused, never
repaired in silence and never used in part.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from restuning._errors import StoreError
from restuning._files import sha256_of_file
from restuning.features.codec import decode, disk_type
from restuning.features.key import SCHEMA, StoreKey

MANIFEST = "manifest.json"
IN_MEMORY = 2 * 2**30
"""Decoded bytes of a split that are held in memory; above, rows are read from the files."""


def default_root() -> Path:
    """`$RESTUNING_CACHE`, else `~/.cache/restuning/features`."""
    chosen = os.environ.get("RESTUNING_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "restuning" / "features"


def stores(root: Path) -> list[Path]:
    """Folders of finished and unfinished stores."""
    if not root.is_dir():
        return []
    return sorted(p for p in root.iterdir() if p.is_dir() and (p / "key.json").exists())


def find_store(name: str | Path, root: Path | None = None) -> Path:
    """A store by its folder, or by the start of its name.

    Raises:
        StoreError: None, or several.
    """
    if (Path(name) / "key.json").exists():
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


class Store:
    """A finished store, opened for reading.

    Args:
        path: Its folder.

    Attributes:
        key: What its values depend on.
        manifest: The whole manifest, with the error report of its dtype.

    Raises:
        StoreError: No store, unfinished, of another schema, or a file is missing or of another
            size than the manifest says.

    Cost: one `stat` a shard; `verify` reads everything.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = _read_manifest(self.path)
        try:
            self.key = StoreKey.from_dict(self.manifest["key"])
            self._shards: dict[tuple[str, int], list[dict[str, Any]]] = {}
            for shard in self.manifest["shards"]:
                self._shards.setdefault((shard["split"], shard["view"]), []).append(shard)
            files = {f["file"]: f for s in self.manifest["shards"] for f in s["files"]}
            files |= {f["file"]: f for f in self.manifest["labels"].values()}
            sizes = {name: int(f["bytes"]) for name, f in files.items()}
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(self.path / MANIFEST, f"{type(error).__name__}: {error}") from None
        self._files = files
        # Sizes tell a truncated copy at once; contents are compared by `verify`.
        for name, size in sizes.items():
            file = self.path / name
            actual = file.stat().st_size if file.exists() else None
            if actual != size:
                what = "it is missing" if actual is None else f"{actual} bytes, written were {size}"
                raise _damaged(file, what)
        self._in_memory: dict[tuple[str, int], Tensor] = {}
        self._maps: dict[str, tuple[np.ndarray, Any]] = {}

    @property
    def bytes(self) -> int:
        """Bytes of all shards."""
        return sum(int(f["bytes"]) for f in self._files.values())

    def verify(self) -> int:
        """Read every file and compare its sha256; returns their number.

        Raises:
            StoreError: One differs.
        """
        for name, entry in self._files.items():
            if sha256_of_file(self.path / name) != entry["sha256"]:
                raise _damaged(self.path / name, "its contents do not match their sha256")
        return len(self._files)

    def labels(self, split: str) -> Tensor:
        """Labels of a split, `n`."""
        return torch.from_numpy(np.load(self.path / self.manifest["labels"][split]["file"]))

    def rows(self, split: str, view: int, indices: Sequence[int]) -> Tensor:
        """Rows of a split in fp32, `len(indices) r`, in the order asked for."""
        whole = self._in_memory.get((split, view))
        if whole is None and self.key.splits[split] * self.key.values_per_row * 4 <= IN_MEMORY:
            whole = torch.cat([self._decode(s) for s in self._shards[(split, view)]])
            self._in_memory[(split, view)] = whole
        at = torch.as_tensor(indices, dtype=torch.long)
        if whole is not None:
            return whole.index_select(0, at)
        return self._read(split, view, at.numpy())

    def taps(self, rows: Tensor) -> dict[str, Tensor]:
        """Rows as taps, `b r` to `b n d` each (views, no copies)."""
        return {
            tap.name: rows[:, part].unflatten(1, tap.shape)
            for tap, part in zip(self.key.taps, self.key.slices.values(), strict=True)
        }

    def _read(self, split: str, view: int, at: np.ndarray) -> Tensor:
        """Rows from the files, one copy each: shards are small, a batch meets most of them."""
        shards = self._shards[(split, view)]
        starts = np.array([shard["start"] for shard in shards])
        which = np.searchsorted(starts, at, side="right") - 1
        shards_open = [self._open(shard) for shard in shards]
        raw = np.empty((len(at), self.key.values_per_row), disk_type(self.key.dtype))
        places = zip(which.tolist(), (at - starts[which]).tolist(), strict=True)
        for place, (shard, row) in enumerate(places):
            raw[place] = shards_open[shard][0][row]
        scales = None
        if self.key.dtype == "int8":
            scales = np.stack([shards_open[shard][1] for shard in which.tolist()])
        return decode(raw, self.key.dtype, scales)

    def _decode(self, shard: Mapping[str, Any]) -> Tensor:
        raw, scales = self._open(shard)
        return decode(np.array(raw), self.key.dtype, scales)

    def _open(self, shard: Mapping[str, Any]) -> tuple[np.ndarray, Any]:
        """A shard's memory map and its scales, opened once."""
        file = shard["files"][0]["file"]
        if file not in self._maps:
            # A plain view: indexing the memory map itself makes an object of its kind each time.
            raw = np.load(self.path / file, mmap_mode="r").view(np.ndarray)
            shape = (shard["stop"] - shard["start"], self.key.values_per_row)
            if raw.shape != shape or raw.dtype != disk_type(self.key.dtype):
                raise _damaged(self.path / file, f"{raw.dtype} {raw.shape}")
            more = shard["files"][1:]
            self._maps[file] = raw, np.load(self.path / more[0]["file"]) if more else None
        return self._maps[file]

    def __reduce__(self) -> tuple:
        """A worker process opens the folder itself."""
        return Store, (self.path,)


def remove(path: Path) -> int:
    """Delete a store's folder; returns the bytes freed.

    Raises:
        StoreError: It is no store, or cannot be deleted.
    """
    if not (path / "key.json").exists():
        raise StoreError("no feature store", where=str(path), fix="`restuning cache ls` lists them")
    freed = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    try:
        # The manifest first: what is half deleted must not look finished.
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)
    except OSError as error:
        raise StoreError(
            "a store cannot be removed",
            where=str(path),
            found=error.strerror or str(error),
            fix="check its permissions",
        ) from None
    return freed


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not file.exists():
        unfinished = (path / "key.json").exists()
        raise StoreError(
            "an unfinished feature store" if unfinished else "no feature store",
            where=str(path),
            fix="run the same `restuning cache` again: it goes on at the shard where it was"
            if unfinished
            else "`restuning cache DATA` builds one, `restuning cache ls` lists them",
        )
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        schema, digest = manifest["key"]["schema"], manifest["digest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(file, f"{type(error).__name__}: {error}") from None
    if schema != SCHEMA:
        raise StoreError(
            "a store of another schema",
            where=str(file),
            found=f"{schema}, we read {SCHEMA}",
            fix="remove it (`restuning cache rm`) and build it again",
        )
    raw = json.dumps(manifest["key"], sort_keys=True).encode()
    if hashlib.sha256(raw).hexdigest() != digest:
        raise _damaged(file, "its key does not match its digest")
    return manifest


def _damaged(file: Path, found: str) -> StoreError:
    return StoreError(
        "a feature store is damaged",
        where=str(file),
        found=found,
        fix="remove it (`restuning cache rm`) and build it again: nothing of it is used",
    )
