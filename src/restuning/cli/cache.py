"""`restuning cache`: build, list, check and remove feature stores."""

from __future__ import annotations

from typing import Annotated, Any

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
            "auto (what methods of one token a tap read), cls, last, pool, all (what all of them read), "
            "all/2 (patches 2 x 2)",
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
    """Compute a data set's features once, for every method that trains beside the backbone.

    The line `serves` names those that need no pass of their own afterwards. Run it in several terminals to
    share the work.
    """
    if what not in VERBS:
        from restuning.backbones import add_quantization
        from restuning.data import DataOptions
        from restuning.features import StoreOptions, build_store, describe_store

        log = log_to(messages(as_json))
        stored = build_store(
            what,
            add_quantization(backbone, quantize),
            weights=weights,
            random=random,
            tokens=tokens,
            device=device,
            options=StoreOptions(store, dtype, precision, views, batch_size, workers, log=log),
            reading=DataOptions(skip_bad=skip_bad, text=text, label=label),
        )
        facts = {**describe_store(stored.store.path), "built_seconds": stored.seconds}
        _show(facts, as_json)
    elif what == "ls":
        from restuning.features import default_root, list_stores

        rows = list_stores(store)
        if as_json:
            show_json(rows)
        else:
            show_rows(rows, f"feature stores in {store or default_root()}")
    elif name is None:
        raise typer.BadParameter(f"`cache {what}` needs the name of a store; `cache ls` lists them")
    elif what == "rm":
        from restuning.features import find_store, remove

        path = find_store(name, store)
        removed = remove(path)
        if as_json:
            show_json({"freed": removed.bytes, "kept": list(removed.kept)})
        else:
            typer.echo(f"{removed.bytes / 2**20:.1f} MiB freed")
            if removed.kept:
                typer.echo(
                    f"not of the store, and kept in {path}: {', '.join(map(ascii, removed.kept))}"
                )
    else:
        from restuning.features import Store, describe_store, find_store

        path = find_store(name, store)
        facts = (
            {"path": str(path), "files verified": Store(path, verify=False).verify()}
            if what == "verify"
            else describe_store(path)
        )
        _show(facts, as_json)


def _show(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        show_json(facts)
    else:
        show_facts(facts, facts["path"])
