"""`restuning plan`: what training will take, before it is started."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from restuning.cli.common import (
    DATA,
    FEATURES,
    METHOD,
    OPTIMISER,
    AudioColumn,
    BackboneName,
    Epochs,
    ImageColumn,
    Json,
    Label,
    Precision,
    ProblemName,
    Rank,
    Seconds,
    SkipBad,
    Text,
    add_heading,
    command,
    complete_method,
    group,
    messages,
    option,
    show_json,
    size_in_words,
    time_in_words,
)
from restuning.cli.config import Config

if TYPE_CHECKING:
    from rich.console import Console

    from restuning.search.forecasts import MethodForecasts, TimedGrid

app = group("Forecast training.")

GRID = "Grid"


@command(
    app,
    "restuning plan --data digits",
    "restuning plan --backbone timm:vit_base_patch16_224 --images 1000 --memory 8GB",
    "restuning plan --backbone timm:vit_small_patch16_224 --method res-tuning --batch 32",
    "restuning plan --data calls.csv --audio path --label species --backbone hf:facebook/wav2vec2-base",
    "restuning plan --data digits --arms 15 --tasks 19",
)
def plan(
    data: Annotated[str | None, option(DATA, "As for train; its examples are counted")] = None,
    images: Annotated[int | None, option(DATA, "Training images, instead of --data", min=1)] = None,
    classes: Annotated[int | None, option(DATA, "Default: of the data, or 100", min=1)] = None,
    skip_bad: SkipBad = False,
    text: Text = "text",
    label: Label = "label",
    image: ImageColumn = None,
    audio: AudioColumn = None,
    seconds: Seconds = None,
    problem: ProblemName = None,
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
    from dataclasses import replace

    import torch

    from restuning import forecast
    from restuning.backbones import AudioPreprocessing
    from restuning.data import DataOptions, load_data
    from restuning.data.media import with_preprocessing
    from restuning.features.codec import check_dtype
    from restuning.search.forecasts import (
        USUAL_METHODS,
        ForecastRequest,
        forecast_methods,
        time_grid,
    )
    from restuning.training import FitSettings

    screen = messages(as_json)
    budget = None if memory is None else forecast.parse_bytes(memory)
    # Made for its check alone: a wrong name is refused before shapes are worked out.
    FitSettings(precision=precision)
    torch.manual_seed(0)
    loaded, host = forecast.load_shapes(backbone)
    if seconds is not None:
        # A sound as long as any that is read.
        loaded = with_preprocessing(loaded, DataOptions(seconds=seconds))
        if isinstance(loaded.preprocessing, AudioPreprocessing):
            loaded = replace(loaded, kwargs=loaded.preprocessing.example())
    known, splits = None, {} if images is None else {"train": images}
    if data is not None:
        known = load_data(
            data,
            loaded,
            skip_bad=skip_bad,
            text=text,
            label=label,
            image=image,
            audio=audio,
            seconds=seconds,
            problem=problem,
        )
        parts = {"train": known.train, "val": known.val, "test": known.test}
        splits = {name: len(part) for name, part in parts.items() if part is not None}
    request = ForecastRequest(
        backbone,
        classes or (known.num_classes if known else 100),
        splits,
        batch,
        epochs,
        budget,
        precision,
        check_dtype(cache_dtype),
        {} if rank is None else {"rank": rank},
    )
    found = forecast_methods(request, (method,) if method else USUAL_METHODS, loaded, host)
    show_forecasts(found, screen)
    report = found.to_dict()
    if arms is not None:
        grid = time_grid(
            request,
            method or "res-tuning-bypass",
            known,
            arms=arms,
            tasks=tasks,
            finals=finals,
        )
        show_grid(grid, screen)
        report["grid"] = grid.to_dict()
    if as_json:
        show_json(report)


def show_forecasts(found: MethodForecasts, screen: Console) -> None:
    """One row a method and form, the one to take in bold, and a sentence."""
    request, forward, taken = found.request, found.forward, found.recommended
    table = Table(
        title=f"{request.backbone}{_size(found)}, batch {request.batch}: weights "
        f"{size_in_words(forward.weights_bytes)}, one forward "
        f"{size_in_words(forward.above_bytes)} above them and about "
        f"{time_in_words(found.forward_seconds)}",
        title_justify="left",
    )
    names = ["method", "form", "reads"]
    figures = ["memory", "above weights", "step / forward"]
    figures += ["run", "store"] if request.splits else []
    figures += ["largest batch"] if request.budget is not None else []
    for column in (*names, *figures):
        table.add_column(
            column,
            justify="right" if column in figures else "left",
            overflow="fold",
            no_wrap=column in ("method", "form"),
        )
    for row in found.options:
        cells = [
            row.method,
            row.form,
            row.reads,
            size_in_words(row.step.total_bytes),
            size_in_words(row.step.above_bytes),
            f"{row.time_over_forward:.2f}",
        ]
        if request.splits:
            cells += [time_in_words(row.seconds), size_in_words(row.store_bytes)]
        if request.budget is not None:
            cells.append(str(row.largest_batch or "none"))
        best = taken is not None and row is taken.option
        table.add_row(*cells, style="bold" if best else "")
    screen.print(table)
    if taken is None:
        screen.print("nothing fits: a smaller backbone or more memory is needed")
    else:
        words = f"{taken.option.method}, {taken.option.form} ({taken.option.reads})"
        screen.print(add_heading("take", f"{words}, batch {taken.batch}: {taken.why}"))
    for method, reason in found.left_out.items():
        screen.print(f"{method}: {reason}")
    if found.note:
        screen.print(add_heading("note", found.note), soft_wrap=True)


def _size(found: MethodForecasts) -> str:
    """The image size of a forecast, and the backbone's own where that is another; "" of texts."""
    from restuning.training.own_size import size_in_words

    size, own = found.image_size, found.own_size
    if size is None:
        return ""
    other = "" if own is None or own == size else f" (its own is {size_in_words(own)})"
    return f" at {size_in_words(size)}{other}"


def show_grid(grid: TimedGrid, screen: Console) -> None:
    """How long a grid takes, and from what that was worked out."""
    (tasks, arms, finals), times, rates = grid.counts, grid.times, grid.measured
    screen.print()
    screen.print(
        add_heading(
            "grid",
            f"{tasks} x {arms} runs of {grid.method}, and {finals} of each choice: "
            f"{time_in_words(times.seconds)} (features {time_in_words(times.features)}, "
            f"search {time_in_words(times.search)}, final {time_in_words(times.final)})",
        )
    )
    screen.print(
        f"  measured here: {rates.forward_seconds * 1e3:.1f} ms an image, "
        f"{rates.step_seconds * 1e3:.1f} ms a step of {rates.arms} arms"
    )
