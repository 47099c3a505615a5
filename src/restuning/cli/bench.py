"""`restuning bench`: grids of tasks, methods and seeds under one protocol."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from restuning.cli.common import (
    BACKBONE,
    DATA,
    FEATURES,
    METHOD,
    ON_RAY,
    OPTIMISER,
    OUTPUT,
    BackboneName,
    BatchSize,
    CacheDtype,
    Clip,
    ImageColumn,
    Json,
    LabelSmoothing,
    Precision,
    StoreFolder,
    Track,
    WeightDecay,
    Weights,
    command,
    complete_backbone,
    console,
    group,
    messages,
    option,
    parse_place,
    show_json,
    show_rows,
)
from restuning.cli.config import Config
from restuning.cli.speech import is_quiet
from restuning.cli.visible import make_visible

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from restuning.bench import Entry, Event, Job

DEFAULT_METHODS = "linear,lora,res-tuning,res-tuning-bypass"

app = group("Compare methods on a suite of tasks, all under one protocol.")

IMAGES = 256
"""As `bench.studies.robustness` has it; a test compares them."""

Folder = Annotated[Path, typer.Argument(help="Folder that `bench run` left")]


Tasks = Annotated[str | None, option(DATA, "Names with commas; default all")]


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


@command(
    app,
    "restuning bench run digits --methods linear,res-tuning --seeds 2 --out runs/grid",
    "restuning bench run vtab/ --tasks cifar100,elpv --methods linear,lora,res-tuning "
    "--backbone timm:vit_tiny_patch16_224 --epochs 20 --precision bf16 "
    "--set lr=1e-3,5e-3 --jobs 2 --out grid",
    "restuning bench run table.csv --image path --label species,season --methods linear,ridge --out grid",
    name="run",
)
def run(
    suite: Annotated[
        str, typer.Argument(help="Folder of tasks, one task, a table, or a data set's name")
    ],
    out: Annotated[Path, option(OUTPUT, "Folder; the same folder goes on")],
    label: Annotated[
        str | None,
        option(DATA, "Of a table its column of classes, default label; several are a task each"),
    ] = None,
    image: ImageColumn = None,
    tasks: Tasks = None,
    methods: Annotated[
        str, option(METHOD, "NAME, NAME:option=value or LABEL=NAME:..., with commas")
    ] = DEFAULT_METHODS,
    ablation: Annotated[
        str | None,
        option(METHOD, "A list of methods by name in place of --methods: see docs/bench.md"),
    ] = None,
    choose: Annotated[
        list[str] | None,
        option(
            METHOD,
            "Settings to choose on validation: lr=1e-3,5e-3, or METHOD:lr=... for one; "
            "also wd, rank, ...",
            "--set",
        ),
    ] = None,
    seeds: Annotated[int, option(METHOD, "Final runs of every method and task", min=1)] = 3,
    backbone: BackboneName = "restuning-tiny",
    weights: Weights = None,
    image_size: Annotated[
        int | None, option(BACKBONE, "Pixels, of a timm backbone; default: its own", min=1)
    ] = None,
    epochs: Annotated[int, option(OPTIMISER, "Of every run", min=1)] = 20,
    batch_size: BatchSize = 64,
    lr: Annotated[
        float,
        option(OPTIMISER, "Highest rate, where none is chosen", "--lr", "--learning-rate"),
    ] = 1e-3,
    weight_decay: WeightDecay = 1e-4,
    label_smoothing: LabelSmoothing = 0.0,
    clip: Clip = None,
    precision: Precision = "no",
    no_cache: Annotated[
        bool, option(FEATURES, "Run the backbone in every epoch, for all methods", "--no-cache")
    ] = False,
    cache_dtype: CacheDtype = "fp32",
    store: StoreFolder = None,
    jobs: Annotated[
        int | None,
        option(
            OUTPUT, "Processes, default 1; with --on ray workers, default one a GPU or core", min=1
        ),
    ] = None,
    threads: Annotated[int, option(OUTPUT, "Of each process", min=1)] = 1,
    on: Annotated[
        str | None,
        option(OUTPUT, f"{ON_RAY} data, folder and stores"),
    ] = None,
    keep: Annotated[bool, option(OUTPUT, "Keep the trained tasks", "--keep")] = False,
    retry: Annotated[bool, option(OUTPUT, "Make failed runs again", "--retry")] = False,
    track: Track = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Train and test every method on every task with every seed; goes on where it was stopped."""
    from restuning.backbones import add_image_size
    from restuning.bench import (
        GridProtocol,
        Job,
        find_tasks,
        list_runs,
        open_grid,
        parse_choices,
        read_results,
        run_grid,
        run_grid_on_ray,
    )
    from restuning.bench.studies.ablations import ablation_entries
    from restuning.features.away import refuse_away
    from restuning.runtime.hub import naming_file
    from restuning.training import FitSettings
    from restuning.training.trackers import check_installed, check_track

    address = parse_place(on)
    refuse_away(store, "`bench run`")
    settings = FitSettings(
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        weight_decay=weight_decay,
        clip=clip,
        label_smoothing=label_smoothing,
        precision=precision,
    )
    protocol = GridProtocol(
        add_image_size(backbone, image_size),
        str(weights) if weights else None,
        settings,
        parse_choices(choose or []),
        not no_cache,
        cache_dtype,
        # A file of options, for the processes that share the work.
        naming_file() or None,
    )
    entries = ablation_entries(ablation) if ablation else _parse_methods(methods)
    found = find_tasks(suite, _names(tasks), label, image)
    runs = list_runs(protocol, found, entries, seeds)
    check_installed(check_track(track or ()))
    # Refuses a folder that was begun under another protocol, before anything is trained.
    left = open_grid(out, protocol, runs, retry)
    stores = None if store is None else Path(store)
    job = Job(protocol, out, runs, stores, keep, threads, tuple(track or ()))
    screen = messages(as_json)
    screen.print(
        Text.assemble(
            f"{len(runs)} runs, {len(left)} to make, in ", (make_visible(str(out)), "bold")
        )
    )
    make = partial(run_grid, jobs=jobs or 1)
    if on is not None:
        make = partial(run_grid_on_ray, address=address, workers=jobs)
    failed = run_with_bar(job, make, len(left), screen)
    results = read_results(out)
    if as_json:
        show_json({"runs": len(runs), "failed": failed, "out": str(out)})
    else:
        screen.print(
            f"{len(results)} results, {failed} failed; `restuning bench report {out}` shows them",
            soft_wrap=True,
        )
    # After the table: what was finished counts, and a script learns that something is missing.
    if failed:
        raise typer.Exit(1)


@command(app, "restuning bench report grid --published vtab-1k")
def report(
    folder: Folder,
    out: Annotated[Path | None, option(OUTPUT, "Default FOLDER/report")] = None,
    tasks: Tasks = None,
    methods: Annotated[str | None, typer.Option(help="Labels with commas; default all")] = None,
    published: Annotated[
        str | None,
        typer.Option(
            help="Papers' tables to show beside: vtab-1k, cifar100, fgvc, "
            "combinations, bypass, original-unbound"
        ),
    ] = None,
    against: Annotated[str | None, typer.Option(help="Method others are compared with")] = None,
) -> None:
    """Tables, plots and one HTML page, all from the JSON that the runs left."""
    from restuning.bench import parse_entries
    from restuning.bench.report import write_report

    labels = [entry.label for entry in parse_entries(methods or "")]
    page, text = write_report(
        folder, out or folder / "report", _names(tasks), labels, _names(published), against
    )
    console.print(
        Text.assemble((str(page), "bold"), " (one file, for a browser) and ", (str(text), "bold")),
        soft_wrap=True,
    )


@command(
    app,
    "restuning bench run digits --keep --out grid",
    "restuning bench robust digits grid --methods linear,res-tuning",
)
def robust(
    suite: Annotated[str, typer.Argument(help="As for run")],
    folder: Annotated[Path, typer.Argument(help="Of a grid that was run with --keep")],
    label: Annotated[str | None, option(DATA, "As for run")] = None,
    image: ImageColumn = None,
    tasks: Tasks = None,
    methods: Annotated[str, option(METHOD, "As for run")] = DEFAULT_METHODS,
    seeds: Annotated[int, option(METHOD, "Final runs of every method and task", min=1)] = 1,
    images: Annotated[int, option(DATA, "Test images of each task", min=1)] = IMAGES,
    backbone: Annotated[
        str | None,
        option(
            BACKBONE,
            "The grid's own, where it is not on this machine or of a kind that no file may choose",
            autocompletion=complete_backbone,
        ),
    ] = None,
    weights: Weights = None,
    threads: Annotated[int, option(OUTPUT, "Of the process", min=1)] = 1,
) -> None:
    """Accuracy of trained tasks under common corruptions, FGSM and PGD."""
    import torch

    from restuning.bench import Bench, find_tasks, list_runs, read_protocol
    from restuning.bench.studies.robustness import robustness, tabulate_robustness

    torch.set_num_threads(threads)
    protocol = read_protocol(folder, weights, backbone)
    worker = Bench(protocol, folder)
    for run in list_runs(
        protocol, find_tasks(suite, _names(tasks), label, image), _parse_methods(methods), seeds
    ):
        if run.stage == "final":
            figures = robustness(worker, run, images)
            console.print(f"{figures['clean']:>7.2%}  {run}")
    text = tabulate_robustness(folder).markdown()
    (folder / "robustness.md").write_text(text, encoding="utf-8")
    console.print(text)


@command(app, "restuning bench check vtab-1k data/vtab-1k")
def check(
    suite: Annotated[str, typer.Argument(help="vtab-1k, fgvc, or shared for any folder of tasks")],
    folder: Annotated[Path, typer.Argument(help="Where it lies")],
    as_json: Json = False,
) -> None:
    """Say what a suite on disk lacks, and print a digest of each task."""
    from restuning.bench.studies.check import check_suite

    found = check_suite(suite, folder)
    if as_json:
        show_json([each.row() for each in found])
    else:
        show_rows(
            [
                {
                    "task": each.task,
                    "examples": " + ".join(map(str, each.sizes.values())),
                    "digest": each.digest,
                    "": "; ".join(each.problems) or "whole",
                }
                for each in found
            ],
            f"{suite} in {folder}",
        )
    wrong = sum(bool(each.problems) for each in found)
    if wrong:
        typer.echo(
            f"{wrong} of {len(found)} tasks are not whole; docs/bench.md says where they come from",
            err=True,
        )
        raise typer.Exit(1)


@command(app, "restuning bench methods", name="methods")
def list_rivals(as_json: Json = False) -> None:
    """What `bench run --methods` takes beside `restuning methods`."""
    from restuning.bench.entries import AUTO_OPTIONS
    from restuning.bench.rivals import RIVALS
    from restuning.search import AUTO

    rows = [
        {"name": name, "what": row.what, "source": row.source, "options": ", ".join(row.takes)}
        for name, row in RIVALS.items()
    ]
    rows.append(
        {
            "name": AUTO,
            "what": "a method chosen on validation, in each run",
            "source": "docs/choosing.md",
            "options": ", ".join(AUTO_OPTIONS),
        }
    )
    if as_json:
        show_json(rows)
    else:
        show_rows(rows, "rivals")


def _parse_methods(text: str) -> list[Entry]:
    """What `--methods` asks for; a name that stands for nothing is refused before any run."""
    from restuning.bench import parse_entries
    from restuning.bench.rivals import RIVALS
    from restuning.methods import check as check_method
    from restuning.search import AUTO

    entries = parse_entries(text)
    for entry in entries:
        # A grid may run for days: a name that stands for nothing must not wait for its turn.
        check_method(entry.method, (AUTO, *RIVALS))
    return entries


def run_with_bar(job: Job, make: Callable[..., int], left: int, screen: Console) -> int:
    """Carry a grid out by `run_grid` or on Ray, under a bar, or with a line for each run where there is no terminal."""
    columns = (
        TextColumn("runs"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[now]}", markup=False),
    )
    bar = Progress(*columns, console=screen, disable=is_quiet() or not screen.is_terminal)
    now: dict[int, str] = {}
    with bar:
        line = bar.add_task("", total=left, now="")

        def listen(event: Event) -> None:
            if event.kind == "start":
                now[event.worker] = event.what
            else:
                now.pop(event.worker, None)
                # A worker that ends, or says something, has finished no run by that.
                bar.advance(line, event.kind not in ("end", "note"))
                screen.print(in_words(event), soft_wrap=True)
            bar.update(line, now=make_visible(" | ".join(now.values())))

        return make(job, listen=listen)


def in_words(event: Event) -> str:
    """One line of a finished run, or of what a worker says."""
    if event.accuracy is None:
        return f"{event.kind:>7}  {event.what}"
    return f"{event.accuracy:>7.2%}  {event.what} ({event.split})"
