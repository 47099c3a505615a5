"""Commands around features that are computed once: `cache`, `sweep`, `plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from restuning.backbones import joined
from restuning.cli import cache as caches
from restuning.cli import sweeping
from restuning.cli.frame import (
    BackboneName,
    Json,
    Quantize,
    Random,
    SkipBad,
    Weights,
    app,
    console,
    plain,
    show_rows,
)
from restuning.features import StoreOptions
from restuning.training.defaults import settings_for
from restuning.training.run import Source


@app.command(
    epilog="[bold]Examples[/bold]\n\nrestuning cache digits\n\n"
    "restuning cache photos/ --backbone timm:vit_base_patch16_224 --dtype fp16 --views 2\n\n"
    "restuning cache ls\n\nrestuning cache verify digits"
)
def cache(
    what: Annotated[str, typer.Argument(help="Data as for train; or ls, info, verify, rm")],
    name: Annotated[str | None, typer.Argument(help="Store, for info, verify and rm")] = None,
    backbone: BackboneName = "restuning-tiny",
    weights: Weights = None,
    random: Random = False,
    quantize: Quantize = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16, fp16, int8 (a scale a channel)")] = "fp32",
    precision: Annotated[
        str, typer.Option(help="What the backbone computes in: fp32 or bf16")
    ] = "fp32",
    tokens: Annotated[
        str,
        typer.Option(
            help="auto (what the readout needs), cls, last, pool, all, all/2 (patches 2 x 2)"
        ),
    ] = "auto",
    views: Annotated[int, typer.Option(help="1; 2 with mirror images; more: random crops")] = 1,
    store: Annotated[Path | None, typer.Option(help="Where feature stores lie")] = None,
    batch_size: int = 32,
    workers: Annotated[int, typer.Option(help="Processes that read images")] = 0,
    skip_bad: SkipBad = False,
    text: str = "text",
    label: str = "label",
    as_json: Json = False,
) -> None:
    """Compute a data set's features once. Run it in several terminals to share the work."""
    if what not in caches.VERBS:
        source = Source(what, skip_bad=skip_bad, text=text, label=label)
        facts = caches.build(
            source,
            backbone=joined(backbone, quantize),
            weights=weights,
            random=random,
            tokens=tokens,
            options=StoreOptions(store, dtype, precision, views, batch_size, workers),
            console=Console(stderr=True) if as_json else console,
        )
    elif what == "ls":
        rows = caches.listing(store)
        if as_json:
            typer.echo(json.dumps(rows, indent=1))
        else:
            show_rows(rows, f"feature stores in {store or caches.default_root()}")
        return
    elif name is None:
        raise typer.BadParameter(f"`cache {what}` needs the name of a store; `cache ls` lists them")
    elif what == "rm":
        freed = caches.delete(name, store)
        typer.echo(json.dumps({"freed": freed}) if as_json else f"{freed / 2**20:.1f} MiB freed")
        return
    else:
        path = caches.find(name, store)
        facts = caches.facts(path)
        if what == "verify":
            facts = {"path": str(path), "files verified": caches.Store(path).verify()}
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
    else:
        show_rows([{"what": k, "": plain(v)} for k, v in facts.items()], facts["path"])


@app.command(
    epilog="[bold]Examples[/bold]\n\nrestuning sweep digits --grid lr=1e-3,5e-3,rank=5,10 --seeds 3\n\n"
    "restuning sweep photos/ --method linear --grid lr=1e-3,1e-2,1e-1 --seeds 1"
)
def sweep(
    data: Annotated[str, typer.Argument(help="As for train; needs a val split")],
    grid: Annotated[
        str,
        typer.Option(
            help="lr=1e-3,5e-3,rank=5,10; also lambda, wd, clip, batch, epochs, scale, ..."
        ),
    ],
    method: Annotated[str, typer.Option(help="A bypass method, or linear")] = "res-tuning-bypass",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of every setting")] = 3,
    backbone: BackboneName = "restuning-tiny",
    weights: Weights = None,
    random: Random = False,
    quantize: Quantize = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training data")] = None,
    batch_size: int = 64,
    augment: Annotated[str, typer.Option(help="none or flip")] = "none",
    out: Annotated[Path | None, typer.Option(help="Folder; the same folder resumes")] = None,
    store: Annotated[Path | None, typer.Option(help="Where feature stores lie")] = None,
    cache_dtype: Annotated[str, typer.Option(help="fp32, bf16, fp16, int8")] = "fp32",
    cache_precision: Annotated[
        str, typer.Option(help="Features computed in fp32 or bf16")
    ] = "fp32",
    skip_bad: SkipBad = False,
    text: str = "text",
    label: str = "label",
    as_json: Json = False,
) -> None:
    """Train a grid of settings from features computed once; choose on val, test the choice."""
    base = settings_for(method, {"epochs": epochs, "batch_size": batch_size})
    console_ = Console(stderr=True) if as_json else console
    source = Source(
        data,
        augment,
        skip_bad=skip_bad,
        text=text,
        label=label,
        store=StoreOptions(
            store,
            cache_dtype,
            cache_precision,
            log=lambda line: console_.print(line, highlight=False),
        ),
    )
    report = sweeping.run(
        source,
        method,
        grid,
        seeds,
        base,
        backbone=joined(backbone, quantize),
        weights=weights,
        random=random,
        out=out,
        console=console_,
    )
    if as_json:
        typer.echo(json.dumps(report, indent=1))
