"""What feature stores say of themselves, as plain values: a row each, or all that one holds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from restuning._errors import StoreError
from restuning.features.key import StoreKey
from restuning.features.manifest import MANIFEST
from restuning.features.store import Store, default_root, stores
from restuning.sites import count_taps

MIB = 2**20


def list_stores(root: str | Path | None = None) -> list[dict[str, Any]]:
    """One row a store, as `restuning cache ls` shows them.

    Args:
        root: Folder of all stores; None for the usual one (`default_root`).

    Returns:
        Name, state ("whole"; "unfinished": building it goes on where it was; "unusable": opening it
        says why), rows, form, size in MiB and backbone. Rows, form and backbone are None of stores
        that are not whole.

    Cost: one `stat` a file.
    """
    return [_row(path) for path in stores(default_root() if root is None else Path(root))]


def _row(path: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"store": path.name, "state": "whole"}
    try:
        store = Store(path, verify=False)
    # Listed as well: they take room, and `rm` frees it.
    except StoreError:
        row["state"] = "unusable" if (path / MANIFEST).exists() else "unfinished"
        size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
        return {**row, "rows": None, "form": None, "MiB": _mib(size), "backbone": None}
    return {
        **row,
        "rows": store.key.rows,
        "form": _form(store.key),
        "MiB": _mib(store.bytes),
        "backbone": store.key.backbone["name"],
    }


def _mib(size: int) -> float:
    # Three digits of a small one: a store of a few hundred rows is less than a tenth of one.
    return round(size / MIB, 1) if size >= 100 * MIB else float(f"{size / MIB:.3g}")


def _form(key: StoreKey) -> str:
    views = f", {len(key.views)} views" if len(key.views) > 1 else ""
    taps = count_taps([tap.name for tap in key.taps])
    return f"{taps}, {key.form}, {key.dtype}{views}"


def describe_store(path: str | Path) -> dict[str, Any]:
    """What a store is, with the error of its dtype, as `restuning cache info` shows it.

    Args:
        path: Its folder (`find_store` finds it by the start of its name).

    Raises:
        StoreError: As `Store`.
    """
    store = Store(path, verify=False)
    key = store.key
    errors = store.manifest["error"].values()
    written = (store.path / MANIFEST).stat().st_mtime
    return {
        "path": str(path),
        "data": key.data["name"],
        "data known by": "contents" if key.known_by_contents else "paths and sizes, or a name",
        "splits": dict(key.splits),
        "views": list(key.views),
        "backbone": key.backbone["name"],
        "taps": [f"{tap.name} {list(tap.shape)}" for tap in key.taps],
        "tokens": key.form,
        "merged away": store.manifest.get("merged away", {}),
        "dtype": key.dtype,
        "precision": key.precision,
        "bytes an input": key.bytes_per_row,
        "bytes": store.bytes,
        "largest relative error": max((e["relative"] for e in errors), default=0.0),
        "largest absolute error": max((e["largest"] for e in errors), default=0.0),
        "shards": len(store.manifest["shards"]),
        "written": time.strftime("%Y-%m-%d %H:%M", time.localtime(written)),
        "digest": key.digest,
    }
