"""`restuning cache`: build, list, check and remove feature stores."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from restuning._errors import StoreError
from restuning.backbones import load_backbone
from restuning.features import (
    Store,
    StoreKey,
    StoreOptions,
    default_root,
    open_or_build,
    remove,
    stores,
)
from restuning.sites import IN_WORDS, Needs, tokens_of
from restuning.training.run import Source

VERBS = ("ls", "info", "verify", "rm")


def build(
    source: Source,
    *,
    backbone: str,
    weights: Path | None,
    random: bool,
    tokens: str,
    options: StoreOptions,
    console: Console,
) -> dict[str, Any]:
    """Build a store of all taps, or go on with one; returns its facts."""
    torch.manual_seed(0)
    loaded = load_backbone(backbone, weights=weights, random=random)
    host = loaded.host()
    if torch.cuda.is_available():
        host.cuda()
    if tokens == "auto":
        tokens = tokens_of(host.readout_rule.pool)
    kind, slash, side = tokens.partition("/")
    if kind not in IN_WORDS or (slash and not (kind == "all" and side.isdigit() and int(side))):
        raise StoreError(
            "no such tokens",
            found=tokens,
            fix="give auto, cls, last, pool, all, or all/2 for patches two by two",
        )
    needs = Needs(host.sites.taps, kind, int(side) if slash else 1)  # type: ignore[arg-type]
    augmented = None
    if options.views > 2:
        augmented = replace(source, augment="timm").load(loaded).train
    kept = open_or_build(
        host,
        loaded,
        source.load(loaded, plain=True),
        needs,
        replace(options, log=lambda line: console.print(line, highlight=False)),
        augmented=augmented,
    )
    if kept is None:
        raise StoreError(
            "texts have different lengths, so all their tokens cannot be stored",
            where=str(source.name),
            fix="give --tokens cls or last, or train live",
        )
    return {**facts(kept.store.path), "built_seconds": kept.seconds}


def listing(root: Path | None) -> list[dict[str, Any]]:
    """One row a store."""
    rows = []
    for path in stores(root or default_root()):
        try:
            store = Store(path)
        except StoreError as error:
            size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
            rows.append(
                {
                    "store": path.name,
                    "state": error.what,
                    "rows": "",
                    "form": "",
                    "MiB": round(size / 2**20, 1),
                    "backbone": "",
                }
            )
            continue
        rows.append(
            {
                "store": path.name,
                "state": "whole",
                "rows": store.key.rows,
                "form": _form(store.key),
                "MiB": round(store.bytes / 2**20, 1),
                "backbone": store.key.backbone["name"],
            }
        )
    return rows


def facts(path: Path) -> dict[str, Any]:
    """What a store is, with the error of its form."""
    store = Store(path)
    key = store.key
    errors = store.manifest["error"].values()
    return {
        "path": str(path),
        "data": key.data["name"],
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
        "largest absolute error": max(
            (e["largest"] for e in store.manifest["error"].values()), default=0.0
        ),
        "shards": len(store.manifest["shards"]),
        "written": time.strftime(
            "%Y-%m-%d %H:%M", time.localtime((path / "manifest.json").stat().st_mtime)
        ),
        "digest": key.digest,
    }


def find(name: str, root: Path | None) -> Path:
    """A store by its folder, or by the start of its name.

    Raises:
        StoreError: None, or several.
    """
    if (Path(name) / "key.json").exists():
        return Path(name)
    fits = [p for p in stores(root or default_root()) if p.name.startswith(name)]
    if len(fits) == 1:
        return fits[0]
    raise StoreError(
        "no such feature store" if not fits else "several feature stores fit",
        where=name,
        found=", ".join(p.name for p in fits[:4]),
        fix="`restuning cache ls` lists them",
    )


def delete(name: str, root: Path | None) -> int:
    """Remove a store; bytes freed."""
    return remove(find(name, root))


def _form(key: StoreKey) -> str:
    views = f", {len(key.views)} views" if len(key.views) > 1 else ""
    return f"{len(key.taps)} taps, {key.form}, {key.dtype}{views}"
