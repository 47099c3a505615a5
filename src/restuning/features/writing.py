"""Files of a store, each written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from restuning._errors import StoreError
from restuning._files import replacing, seal, sha256_of_file, write_bytes
from restuning._version import __version__
from restuning.features.codec import encode, error_report
from restuning.features.key import StoreKey
from restuning.features.manifest import MANIFEST, MARKS, Shard, read_entry

Lost = dict[str, tuple[float, float]]
"""By tap: squares of what merging takes from patches, and of patches around their mean."""


def is_written(folder: Path, shard: Shard) -> bool:
    """Whether a shard is whole: its entry is written last."""
    return (folder / f"{shard.name}.json").exists()


def write_shard(
    folder: Path,
    key: StoreKey,
    shard: Shard,
    rows: Tensor,
    labels: list[int],
    lost: Lost | None = None,
) -> None:
    """Write one shard: its files first, then the entry that says it is whole."""
    values, scales = encode(rows, key.dtype)
    error = {} if key.dtype == "fp32" else error_report(rows, key.dtype, key.slices)
    arrays = {f"{shard.name}.npy": values}
    if scales is not None:
        arrays[f"{shard.name}.scales.npy"] = scales
    files = []
    with explain_write_errors(folder):
        for name, array in arrays.items():
            file = _write_array(folder / name, array)
            files.append(
                {"file": name, "bytes": file.stat().st_size, "sha256": sha256_of_file(file)}
            )
        entry = {
            "split": shard.split,
            "view": shard.view,
            "start": shard.start,
            "stop": shard.stop,
            "files": files,
            "labels": labels,
            "error": error,
            "lost": lost or {},
        }
        write_bytes(folder / f"{shard.name}.json", json.dumps(seal(entry)).encode())


def finish(folder: Path, key: StoreKey, plan: list[Shard]) -> None:
    """Write labels and the manifest over all shards: the store is finished."""
    entries = [read_entry(folder, key, shard) for shard in plan]
    labels: dict[str, Any] = {}
    with explain_write_errors(folder):
        for split in key.splits:
            values = [
                y for e in entries if e["split"] == split and e["view"] == 0 for y in e["labels"]
            ]
            array = np.asarray(values, dtype=np.int64)
            file = _write_array(folder / f"{split}.labels.npy", array)
            labels[split] = {
                "file": file.name,
                "bytes": file.stat().st_size,
                "sha256": sha256_of_file(file),
            }
        error = {
            tap.name: {
                kind: max((e["error"][tap.name][kind] for e in entries if e["error"]), default=0.0)
                for kind in ("largest", "relative")
            }
            for tap in key.taps
        }
        shards = [
            {k: v for k, v in e.items() if k not in ("labels", "error", "lost")} for e in entries
        ]
        manifest = {
            "library": f"restuning {__version__}",
            "digest": key.digest,
            "key": key.to_dict(),
            "error": error,
            "labels": labels,
            "shards": shards,
        }
        if key.pool_patches > 1:
            manifest["merged away"] = _shares(entries)
        write_bytes(folder / MANIFEST, (json.dumps(seal(manifest), indent=1) + "\n").encode())
        # Of writers that were killed, and of shares: the manifest says what they said.
        patterns = ("*.lock", ".*.partial", MARKS)
        for leftover in [file for pattern in patterns for file in folder.glob(pattern)]:
            leftover.unlink(missing_ok=True)


def _shares(entries: list[dict[str, Any]]) -> dict[str, float]:
    """Of the patches' variance inside an image, by tap, what merging took."""
    names = dict.fromkeys(name for entry in entries for name in entry["lost"])
    shares = {}
    for name in names:
        taken, there = (sum(e["lost"][name][n] for e in entries) for n in (0, 1))
        shares[name] = taken / there if there else 0.0
    return shares


def _write_array(file: Path, array: np.ndarray) -> Path:
    with replacing(file) as partial, partial.open("wb") as stream:
        np.save(stream, array)
    return file


@contextmanager
def explain_write_errors(folder: Path) -> Iterator[None]:
    """Turns a full or read-only disk into one error that says what is kept."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            "a feature store cannot be written",
            where=str(folder),
            found=error.strerror or str(error),
            fix="free space or choose --store elsewhere, and run the same command again: "
            "shards that were finished are kept",
        ) from None
