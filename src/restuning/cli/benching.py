"""`restuning bench`: grids of tasks, methods and seeds under one protocol."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from restuning._errors import BackboneError
from restuning.bench import (
    Bench,
    Entry,
    Event,
    Job,
    Protocol,
    carry_out,
    find_tasks,
    open_grid,
    parse_choices,
    parse_entries,
    plan,
    protocol_of,
    read_results,
)
from restuning.bench.chosen import TAKES
from restuning.bench.report import write_report
from restuning.bench.rivals import RIVALS
from restuning.bench.studies.ablations import ABLATIONS, entries_of
from restuning.bench.studies.check import check_suite
from restuning.bench.studies.robustness import IMAGES, robustness, robustness_table
from restuning.cli.frame import BackboneName, Json, Weights, app, console, show_rows
from restuning.methods import check as check_method
from restuning.search import AUTO
from restuning.training import FitSettings

DEFAULT_METHODS = "linear,lora,res-tuning,res-tuning-bypass"

bench = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Compare methods on a suite of tasks, all under one protocol.",
)
app.add_typer(bench, name="bench")

Folder = Annotated[Path, typer.Argument(help="Folder that `bench run` left")]


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def sized(backbone: str, size: int | None) -> str:
    """A backbone's name with the size of its images: `timm:NAME` at 112 is `timm:NAME@112`.

    Raises:
        BackboneError: It takes none.
    """
    if size is None:
        return backbone
    scheme, _, rest = backbone.partition(":")
    name, colon, arguments = rest.partition(":")
    if scheme != "timm" or "@" in name:
        raise BackboneError(
            "an image size is given to backbones of timm",
            where=backbone,
            fix="leave --image-size out",
        )
    return f"timm:{name}@{size}{colon}{arguments}"


@bench.command(
    "run",
    epilog="[bold]Examples[/bold]\n\n"
    "restuning bench run digits --methods linear,res-tuning --seeds 2 --out runs/grid\n\n"
    "restuning bench run vtab/ --tasks cifar100,elpv --methods linear,lora,res-tuning "
    "--backbone timm:vit_tiny_patch16_224 --image-size 112 --epochs 20 --precision bf16 "
    "--set lr=1e-3,5e-3 --jobs 2 --out grid",
)
def run(
    suite: Annotated[str, typer.Argument(help="Folder of tasks, one task, or a data set's name")],
    out: Annotated[Path, typer.Option(help="Folder; the same folder goes on")],
    tasks: Annotated[str | None, typer.Option(help="Names with commas; default all")] = None,
    methods: Annotated[
        str, typer.Option(help="NAME, NAME:option=value or LABEL=NAME:..., with commas")
    ] = DEFAULT_METHODS,
    ablation: Annotated[
        str | None,
        typer.Option(help=f"A list of methods in place of --methods: {', '.join(ABLATIONS)}"),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Final runs of every method and task")] = 3,
    backbone: BackboneName = "restuning-tiny",
    weights: Weights = None,
    image_size: Annotated[int | None, typer.Option(help="Pixels, of a timm backbone")] = None,
    epochs: Annotated[int, typer.Option(help="Of every run")] = 20,
    batch_size: int = 64,
    lr: Annotated[float, typer.Option(help="Highest rate, where none is chosen")] = 1e-3,
    weight_decay: float = 1e-4,
    label_smoothing: float = 0.0,
    clip: Annotated[float | None, typer.Option(help="Largest gradient norm")] = None,
    precision: Annotated[str, typer.Option(help="no, bf16, fp16")] = "no",
    choose: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Settings to choose on validation: lr=1e-3,5e-3, or "
            "METHOD:lr=... for one; also wd, rank, ...",
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Of each process")] = 1,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Run the backbone in every epoch, for all methods")
    ] = False,
    cache_dtype: Annotated[str, typer.Option(help="fp32, bf16, fp16, int8")] = "fp32",
    store: Annotated[Path | None, typer.Option(help="Where feature stores lie")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the trained tasks")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Make failed runs again")] = False,
    as_json: Json = False,
) -> None:
    """Train and test every method on every task with every seed; goes on where it was stopped."""
    settings = FitSettings(
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        weight_decay=weight_decay,
        clip=clip,
        label_smoothing=label_smoothing,
        precision=precision,
    )
    protocol = Protocol(
        sized(backbone, image_size),
        str(weights) if weights else None,
        settings,
        parse_choices(choose or []),
        not no_cache,
        cache_dtype,
    )
    entries = entries_of(ablation) if ablation else _entries(methods)
    runs = plan(protocol, find_tasks(suite, _names(tasks)), entries, seeds)
    left = open_grid(out, protocol, runs, retry)
    job = Job(protocol, out, runs, store, keep, threads)
    told = Console(stderr=True) if as_json else console
    told.print(f"{len(runs)} runs, {len(left)} to make, in [bold]{out}[/bold]")
    failed = watched(job, jobs, len(left), told)
    results = read_results(out)
    if as_json:
        typer.echo(json.dumps({"runs": len(runs), "failed": failed, "out": str(out)}))
    else:
        told.print(
            f"{len(results)} results, {failed} failed; `restuning bench report {out}` shows them",
            soft_wrap=True,
        )
    if failed:
        raise typer.Exit(1)


@bench.command(
    "report", epilog="[bold]Example[/bold]\n\nrestuning bench report grid --published vtab-1k"
)
def report(
    folder: Folder,
    out: Annotated[Path | None, typer.Option(help="Default FOLDER/report")] = None,
    tasks: Annotated[str | None, typer.Option(help="Names with commas; default all")] = None,
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
    labels = [entry.label for entry in parse_entries(methods or "")]
    page, text = write_report(
        folder, out or folder / "report", _names(tasks), labels, _names(published), against
    )
    console.print(
        f"[bold]{page}[/bold] (one file, for a browser) and [bold]{text}[/bold]", soft_wrap=True
    )


@bench.command(
    "robust",
    epilog="[bold]Example[/bold]\n\nrestuning bench run digits --keep --out grid\n\n"
    "restuning bench robust digits grid --methods linear,res-tuning",
)
def robust(
    suite: Annotated[str, typer.Argument(help="As for run")],
    folder: Annotated[Path, typer.Argument(help="Of a grid that was run with --keep")],
    tasks: Annotated[str | None, typer.Option(help="Names with commas; default all")] = None,
    methods: Annotated[str, typer.Option(help="As for run")] = DEFAULT_METHODS,
    seeds: Annotated[int, typer.Option(min=1)] = 1,
    images: Annotated[int, typer.Option(min=1, help="Test images of each task")] = IMAGES,
    weights: Weights = None,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Accuracy of trained tasks under common corruptions, FGSM and PGD."""
    torch.set_num_threads(threads)
    protocol = protocol_of(folder, weights)
    worker = Bench(protocol, folder)
    for run in plan(protocol, find_tasks(suite, _names(tasks)), _entries(methods), seeds):
        if run.stage == "final":
            found = robustness(worker, run, images)
            console.print(f"{found['clean']:>7.2%}  {run}", highlight=False, markup=False)
    text = robustness_table(folder).markdown()
    (folder / "robustness.md").write_text(text, encoding="utf-8")
    console.print(text, markup=False)


@bench.command("check", epilog="[bold]Example[/bold]\n\nrestuning bench check vtab-1k data/vtab-1k")
def check(
    suite: Annotated[str, typer.Argument(help="vtab-1k, fgvc, or shared for any folder of tasks")],
    folder: Annotated[Path, typer.Argument(help="Where it lies")],
    as_json: Json = False,
) -> None:
    """Say what a suite on disk lacks, and print a digest of each task."""
    found = check_suite(suite, folder)
    if as_json:
        typer.echo(json.dumps([each.row() for each in found], indent=1))
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


@bench.command("methods")
def list_rivals(as_json: Json = False) -> None:
    """What `bench run --methods` takes beside `restuning methods`."""
    rows = [
        {"name": name, "what": row.what, "source": row.source, "options": ", ".join(row.takes)}
        for name, row in RIVALS.items()
    ]
    rows.append(
        {
            "name": AUTO,
            "what": "a method chosen on validation, in each run",
            "source": "docs/choosing.md",
            "options": ", ".join(TAKES),
        }
    )
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        show_rows(rows, "rivals")


def _entries(text: str) -> list[Entry]:
    """What `--methods` asks for; a name that stands for nothing is refused before any run."""
    entries = parse_entries(text)
    for entry in entries:
        check_method(entry.method, (AUTO, *RIVALS))
    return entries


def watched(job: Job, jobs: int, left: int, told: Console) -> int:
    """Carry a grid out under a bar, or with a line for each run where there is no terminal."""
    columns = (
        TextColumn("runs"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[now]}"),
    )
    bar = Progress(*columns, console=told, disable=not told.is_terminal)
    now: dict[int, str] = {}
    with bar:
        line = bar.add_task("", total=left, now="")

        def listen(event: Event) -> None:
            if event.kind == "start":
                now[event.worker] = event.what
            else:
                now.pop(event.worker, None)
                bar.advance(line, event.kind != "end")
                told.print(in_words(event), highlight=False, markup=False, soft_wrap=True)
            bar.update(line, now=" | ".join(now.values()))

        return carry_out(job, jobs, listen)


def in_words(event: Event) -> str:
    """One line of a finished run."""
    if event.accuracy is None:
        return f"{event.kind:>7}  {event.what}"
    return f"{event.accuracy:>7.2%}  {event.what} ({event.split})"
