"""`restuning cache`: build, list, check and remove feature stores."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from restuning.cli.common import (
    FEATURES,
    BackboneName,
    CacheDtype,
    CachePrecision,
    Device,
    Json,
    Label,
    Quantize,
    Random,
    SkipBad,
    StoreFolder,
    Text,
    Weights,
    Workers,
    command,
    group,
    messages,
    option,
    show_facts,
    show_json,
    show_rows,
)
from restuning.cli.config import Config
from restuning.cli.report import log_to

if TYPE_CHECKING:
    from restuning.features import StoreKey, StoreOptions
    from restuning.training.run import Source

app = group("Compute features once.")

VERBS = ("ls", "info", "verify", "rm")


@command(
    app,
    "restuning cache digits",
    "restuning cache photos/ --backbone timm:vit_base_patch16_224 --dtype fp16 --views 2",
    "restuning cache ls",
    "restuning cache verify digits",
)
def cache(
    what: Annotated[str, typer.Argument(help="Data as for train; or ls, info, verify, rm")],
    name: Annotated[str | None, typer.Argument(help="Store, for info, verify and rm")] = None,
    skip_bad: SkipBad = False,
    text: Text = "text",
    label: Label = "label",
    workers: Workers = 0,
    backbone: BackboneName = "restuning-tiny",
    weights: Weights = None,
    random: Random = False,
    quantize: Quantize = None,
    device: Device = None,
    dtype: CacheDtype = "fp32",
    precision: CachePrecision = "fp32",
    tokens: Annotated[
        str,
        option(
            FEATURES,
            "auto (what the readout needs), cls, last, pool, all, all/2 (patches 2 x 2)",
        ),
    ] = "auto",
    views: Annotated[
        int, option(FEATURES, "1; 2 with mirror images; more: random crops", min=1)
    ] = 1,
    store: StoreFolder = None,
    batch_size: Annotated[int, option(FEATURES, "Inputs of one forward", min=1)] = 32,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Compute a data set's features once. Run it in several terminals to share the work."""
    if what not in VERBS:
        from restuning.backbones import add_quantization
        from restuning.features import StoreOptions
        from restuning.training.run import Source

        log = log_to(messages(as_json))
        facts = build_store(
            Source(what, skip_bad=skip_bad, text=text, label=label),
            StoreOptions(store, dtype, precision, views, batch_size, workers, log=log),
            backbone=add_quantization(backbone, quantize),
            weights=weights,
            random=random,
            device=device,
            tokens=tokens,
        )
        _show(facts, as_json)
    elif what == "ls":
        from restuning.features import default_root

        rows = list_stores(store)
        if as_json:
            show_json(rows)
        else:
            show_rows(rows, f"feature stores in {store or default_root()}")
    elif name is None:
        raise typer.BadParameter(f"`cache {what}` needs the name of a store; `cache ls` lists them")
    elif what == "rm":
        freed = delete(name, store)
        if as_json:
            show_json({"freed": freed})
        else:
            typer.echo(f"{freed / 2**20:.1f} MiB freed")
    else:
        path = find(name, store)
        _show(verified(path) if what == "verify" else facts_of(path), as_json)


def _show(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        show_json(facts)
    else:
        show_facts(facts, facts["path"])


def build_store(
    source: Source,
    options: StoreOptions,
    *,
    backbone: str,
    weights: Path | None,
    random: bool,
    device: str | None,
    tokens: str,
) -> dict[str, Any]:
    """Build a store of all taps, or go on with one; returns its facts."""
    import torch

    from restuning._errors import StoreError
    from restuning.backbones import load_backbone
    from restuning.features import open_or_build
    from restuning.sites import IN_WORDS, Needs, resolve_tokens
    from restuning.training.device import on_device

    torch.manual_seed(0)
    loaded = load_backbone(backbone, weights=weights, random=random)
    host = loaded.host()
    if tokens == "auto":
        tokens = resolve_tokens(host.readout_rule.pool)
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
    with on_device(device) as place:
        host.to(place)
        stored = open_or_build(
            host, loaded, source.load(loaded, plain=True), needs, options, augmented=augmented
        )
    if stored is None:
        raise StoreError(
            "texts have different lengths, so all their tokens cannot be stored",
            where=str(source.name),
            fix="give --tokens cls or last, or train live",
        )
    return {**facts_of(stored.store.path), "built_seconds": stored.seconds}


def list_stores(root: Path | None) -> list[dict[str, Any]]:
    """One row a store."""
    from restuning._errors import StoreError
    from restuning.features import Store, default_root, stores

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


def facts_of(path: Path) -> dict[str, Any]:
    """What a store is, with the error of its form."""
    from restuning.features import Store

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


def verified(path: Path) -> dict[str, Any]:
    """The number of files whose digests are right.

    Raises:
        StoreError: A file is not what was written.
    """
    from restuning.features import Store

    return {"path": str(path), "files verified": Store(path).verify()}


def find(name: str, root: Path | None) -> Path:
    """A store by its folder, or by the start of its name.

    Raises:
        StoreError: None, or several.
    """
    from restuning._errors import StoreError
    from restuning.features import default_root, stores

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
    from restuning.features import remove

    return remove(find(name, root))


def _form(key: StoreKey) -> str:
    views = f", {len(key.views)} views" if len(key.views) > 1 else ""
    return f"{len(key.taps)} taps, {key.form}, {key.dtype}{views}"
