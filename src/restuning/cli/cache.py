"""`restuning cache`: build, share out, merge, list, check, export and remove feature stores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from restuning.cli.common import (
    DATA,
    FEATURES,
    ON_RAY,
    OUTPUT,
    AudioColumn,
    BackboneName,
    CacheDtype,
    CachePrecision,
    ClassesFile,
    Device,
    ImageColumn,
    Json,
    Label,
    ProblemName,
    Quantize,
    Random,
    ScaledJpeg,
    Seconds,
    SkipBad,
    StoreFolder,
    Text,
    Weights,
    Whole,
    command,
    group,
    messages,
    option,
    parse_place,
    show_facts,
    show_json,
    show_rows,
)
from restuning.cli.config import Config
from restuning.cli.results import log_to

app = group("Compute features once.")

VERBS = {
    "ls": ("store",),
    **dict.fromkeys(("info", "verify", "rm", "merge"), ("name", "store")),
    "export": ("name", "store", "to", "out", "label"),
}
"""What is done with stores that are there, and what it is told by."""
OF_ALL = ("what", "as_json", "config")
OF_VERBS = ("name", "to", "out")
"""What `cache DATA` is not told."""


@command(
    app,
    "restuning cache digits",
    "restuning cache photos/ --backbone timm:vit_base_patch16_224 --dtype fp16 --views 2",
    "restuning cache ls",
    "restuning cache verify digits",
    "restuning cache photos/ --shard 3/8 --store shared/",
    "restuning cache 'shots-{000..127}.tar' --label kind",
    "restuning cache merge photos/ --store shared/",
    "restuning cache export photos/ --to parquet --out photos-features/",
)
def cache(
    ctx: typer.Context,
    what: Annotated[
        str, typer.Argument(help="Data as for train; or ls, info, verify, rm, merge, export")
    ],
    name: Annotated[
        str | None, typer.Argument(help="Store, for info, verify and rm; data for merge, export")
    ] = None,
    skip_bad: SkipBad = False,
    text: Text = "text",
    label: Label = "label",
    image: ImageColumn = None,
    audio: AudioColumn = None,
    seconds: Seconds = None,
    problem: ProblemName = None,
    classes: ClassesFile = None,
    whole: Whole = False,
    scaled_jpeg: ScaledJpeg = False,
    workers: Annotated[
        int | None,
        option(
            DATA,
            "Processes that read and decode files; default: cores but one, none for few files; "
            "0: none beside this one",
            min=0,
        ),
    ] = None,
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
    shard: Annotated[
        str | None,
        option(
            FEATURES,
            "3/8: the third of eight workers' shares, without a lock; `cache merge` makes a store of all",
        ),
    ] = None,
    on: Annotated[
        str | None,
        option(FEATURES, f"{ON_RAY} data and store"),
    ] = None,
    shard_size: Annotated[
        str | None,
        option(
            FEATURES,
            "Of one file, e.g. 128MB; default: 64MiB and 512 inputs at most, 256MB of a store of more than 1000 such files",
        ),
    ] = None,
    to: Annotated[
        str | None,
        option(OUTPUT, "Of export: parquet or arrow; default: as --out ends, else parquet"),
    ] = None,
    out: Annotated[
        Path | None, option(OUTPUT, "Of export: folder of a file a split; default NAME.parquet")
    ] = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Compute a data set's features once, for every method that trains beside the backbone.

    The line `serves` names those that need no pass of their own afterwards. Run it in several terminals to
    share the work.
    """
    _refuse_unused(ctx, what)
    if what not in VERBS:
        from restuning.backbones import add_quantization
        from restuning.data import DataOptions
        from restuning.data.remote import is_url
        from restuning.features import StoreOptions, build_store, describe_store, write_share
        from restuning.forecast import parse_bytes

        options = StoreOptions(
            *(store, dtype, precision, views, batch_size, workers),
            log=log_to(messages(as_json)),
            shard_bytes=None if shard_size is None else parse_bytes(shard_size),
        )
        how = {
            "weights": weights,
            "random": random,
            "tokens": tokens,
            "device": device,
            "options": options,
            "reading": DataOptions(
                skip_bad=skip_bad,
                text=text,
                label=label,
                image=image,
                audio=audio,
                problem=problem,
                classes=classes,
                whole=whole,
                scaled_jpeg=scaled_jpeg,
                seconds=seconds,
            ),
        }
        named = add_quantization(backbone, quantize)
        if shard is not None and on is None:
            written = write_share(what, named, shard, **how)
            options.log(
                f"share {written.share} is whole; when all are: restuning cache merge {what} "
                f"--store {store if is_url(store) else written.path.parent}"
            )
            told = {"path": str(written.path), "share": str(written.share), "rows": written.rows}
            if as_json:
                show_json({**told, "time": written.stages.to_dict()})
            return
        if on is not None:
            from restuning.features import build_on_ray

            if shard is not None:
                raise typer.BadParameter("--on ray shares the work itself: leave --shard out")
            built = build_on_ray(what, named, parse_place(on), **how)
            _show(describe_store(built.path), as_json)
            return
        stored = build_store(what, named, **how)
        facts = {**describe_store(stored.store.path), "built_seconds": stored.seconds}
        # Without --json a line said it.
        if as_json and stored.stages is not None:
            facts["time"] = stored.stages.to_dict()
        _show(facts, as_json)
    elif what == "ls":
        from restuning.features import default_root, list_stores
        from restuning.features.away import refuse_away

        refuse_away(store, "`cache ls`")
        rows = list_stores(None if store is None else Path(store))
        if as_json:
            show_json(rows)
        else:
            show_rows(rows, f"feature stores in {store or default_root()}")
    elif name is None:
        raise typer.BadParameter(f"`cache {what}` needs the name of a store; `cache ls` lists them")
    elif what == "merge":
        from restuning.features import describe_store, merge_shares

        _show(describe_store(merge_shares(name, store).path), as_json)
    elif what == "export":
        from restuning.features import export_store

        _show(export_store(name, out, to=to, label=label, root=store), as_json)
    elif what == "rm":
        from restuning.features import find_store, remove
        from restuning.features.away import refuse_away

        refuse_away(store, "`cache rm`")
        path = find_store(name, None if store is None else Path(store))
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
        from restuning.features.away import mirror_of

        here = mirror_of(name, store, lambda root: {})
        path = find_store(name, here or (None if store is None else Path(store)))
        facts = (
            {"path": str(path), "files verified": Store(path, verify=False).verify()}
            if what == "verify"
            else describe_store(path)
        )
        _show(facts, as_json)


def _refuse_unused(ctx: typer.Context, what: str) -> None:
    """Refuse what was given, typed or in a file of options, and would be ignored."""
    for each in ctx.command.params:
        name = str(each.name)
        source = ctx.get_parameter_source(name)
        used = name in VERBS[what] if what in VERBS else name not in OF_VERBS
        if source is None or source.name == "DEFAULT" or used or name in OF_ALL:
            continue
        given = each.opts[0] if each.param_type_name == "option" else repr(ctx.params[name])
        raise typer.BadParameter(
            f"`cache {what if what in VERBS else 'DATA'}` takes none: leave it out",
            param_hint=given,
        )


def _show(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        show_json(facts)
    else:
        show_facts(facts, facts["path"])
