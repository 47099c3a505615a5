"""`restuning plan`: what training will take, before it is started."""

from __future__ import annotations

from typing import Annotated

import typer

from restuning.cli.common import (
    DATA,
    FEATURES,
    METHOD,
    OPTIMISER,
    BackboneName,
    Epochs,
    Json,
    Label,
    Precision,
    Rank,
    SkipBad,
    Text,
    command,
    complete_method,
    group,
    messages,
    option,
    show_json,
)
from restuning.cli.config import Config

app = group("Forecast training.")

GRID = "Grid"


@command(
    app,
    "restuning plan --data digits",
    "restuning plan --backbone timm:vit_base_patch16_224 --images 1000 --memory 8GB",
    "restuning plan --backbone timm:vit_small_patch16_224 --method res-tuning --batch 32",
    "restuning plan --data digits --arms 15 --tasks 19",
)
def plan(
    data: Annotated[str | None, option(DATA, "As for train; its images are counted")] = None,
    images: Annotated[int | None, option(DATA, "Training images, instead of --data", min=1)] = None,
    classes: Annotated[int | None, option(DATA, "Default: of the data, or 100", min=1)] = None,
    skip_bad: SkipBad = False,
    text: Text = "text",
    label: Label = "label",
    backbone: BackboneName = "restuning-tiny",
    method: Annotated[
        str | None,
        option(METHOD, "One method; without it four", autocompletion=complete_method),
    ] = None,
    rank: Rank = None,
    memory: Annotated[str | None, option(OPTIMISER, "Budget for everything, e.g. 8GB")] = None,
    batch: Annotated[
        int, option(OPTIMISER, "Examples of one step", "--batch", "--batch-size", min=1)
    ] = 64,
    epochs: Epochs = None,
    precision: Precision = "no",
    cache_dtype: Annotated[
        str, option(FEATURES, "How stored ones are kept: fp32, bf16, fp16, int8")
    ] = "fp32",
    arms: Annotated[
        int | None, option(GRID, "Runs of a grid (their times are measured here)", min=1)
    ] = None,
    tasks: Annotated[int, option(GRID, "Data sets of a grid", min=1)] = 1,
    finals: Annotated[int, option(GRID, "Runs of a grid's choice", min=0)] = 3,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """What training takes and what to choose, from shapes alone; no weights, no training."""
    if data is not None and images is not None:
        raise typer.BadParameter("give --data or --images, not both")
    import torch

    from restuning import forecast
    from restuning.cli import planning
    from restuning.data import load_data
    from restuning.features.codec import check_dtype
    from restuning.training import FitSettings

    console = messages(as_json)
    budget = None if memory is None else forecast.parse_bytes(memory)
    FitSettings(precision=precision)
    torch.manual_seed(0)
    loaded, host = forecast.load_shapes(backbone)
    known, splits = None, {} if images is None else {"train": images}
    if data is not None:
        known = load_data(data, loaded, skip_bad=skip_bad, text=text, label=label)
        parts = {"train": known.train, "val": known.val, "test": known.test}
        splits = {name: len(part) for name, part in parts.items() if part is not None}
    request = planning.Request(
        backbone,
        classes or (known.num_classes if known else 100),
        splits,
        batch,
        epochs,
        budget,
        precision,
        check_dtype(cache_dtype),
        {"rank": rank} if rank else {},
    )
    methods = (method,) if method else planning.COMPARED
    report = planning.run(request, methods, loaded, host, console)
    if arms is not None:
        report["grid"] = planning.grid(
            request,
            method or "res-tuning-bypass",
            known,
            arms=arms,
            tasks=tasks,
            finals=finals,
            console=console,
        )
    if as_json:
        show_json(report)
