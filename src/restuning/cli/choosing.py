"""`train --method auto`: a method chosen on validation, then trained as any other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from restuning._errors import TrainingError
from restuning.backbones import load_backbone
from restuning.cli.frame import time_in_words
from restuning.cli.report import show
from restuning.cli.training import Source, default_folder, opened, train_one
from restuning.data import with_validation
from restuning.features.stored import VIEWS_OF
from restuning.search import AUTO, Budget, Choice, bytes_in_words, choose, open_inputs
from restuning.training import FitSettings

CHOSEN = "choice.json"
"""In the run's folder, and in the task folder."""


def budget_of(
    method: str | None, memory: str | None, minutes: float | None, fixed: dict[str, Any]
) -> Budget | None:
    """The budget of `--method auto`; None of another method.

    Args:
        method: That was asked for.
        memory, minutes: As they were written.
        fixed: Options that say what a choice would find, by name; None or False where not given.

    Raises:
        TrainingError: Options that do not go together.
        ForecastError: Not an amount of memory.
    """
    if method != AUTO:
        limits = {"--memory": memory, "--minutes": minutes}
        if given := [name for name, value in limits.items() if value is not None]:
            raise TrainingError(
                "a budget is for --method auto",
                where=" ".join(given),
                found=f"--method {method}",
                fix="give --method auto; `restuning plan` forecasts what one method takes",
            )
        return None
    if given := [name for name, value in fixed.items() if value]:
        raise TrainingError(
            "--method auto chooses this itself",
            where=" ".join(given),
            fix="leave it out, or name a method",
        )
    return Budget.of(memory, minutes)


def train(
    source: Source,
    settings: FitSettings,
    budget: Budget,
    *,
    backbone: str,
    weights: Path | None,
    random: bool,
    out: Path | None,
    options: dict[str, Any],
    resume: bool,
    console: Console,
) -> dict[str, Any]:
    """Choose on the validation split, train on both splits, test once; returns the row."""
    if not source.cache or source.augment not in VIEWS_OF:
        raise TrainingError(
            "--method auto trains from stored features first",
            where="--no-cache" if not source.cache else f"--augment {source.augment}",
            fix=f"leave --no-cache out, and give --augment {' or '.join(VIEWS_OF)}",
        )
    torch.manual_seed(settings.seed)
    loaded = load_backbone(backbone, weights=weights, random=random)
    given = source.load(loaded)
    data, plain = with_validation(given), with_validation(source.load(loaded, plain=True))
    host, options = opened(loaded, data, options, console)
    if given.val is None:
        console.print(
            f"  no validation split: {len(data.val)} of {len(given.train)} training "
            "examples are held out for the choice",
            highlight=False,
        )
    folder = out or default_folder(data, AUTO)

    def say(line: str) -> None:
        console.print(f"  {line}", highlight=False)

    feed = open_inputs(
        host,
        loaded,
        data,
        plain=plain,
        root=source.root,
        views=VIEWS_OF[source.augment],
        dtype=source.dtype,
        precision=source.precision,
        workers=settings.workers,
        options=options,
        say=say,
    )
    console.print(f"\n[bold]auto[/bold]  on {len(data.val)} validation examples")
    choice = choose(
        host,
        feed,
        settings,
        folder / "choice",
        budget=budget,
        resume=resume,
        say=say,
    )
    show_choice(choice, console)
    final = replace(source, final=True)
    row = train_one(
        choice.method,
        host,
        final,
        final.load(loaded),
        loaded,
        choice.settings(settings),
        folder,
        options,
        resume,
        console,
        told={"choice": choice.to_dict()},
        begin=choice.begin,
    )
    text = json.dumps(choice.to_dict(), indent=1) + "\n"
    for place in (folder, folder / f"{data.name}.task"):
        (place / CHOSEN).write_text(text, encoding="utf-8")
    show([row], console)
    console.print(f"left in [bold]{folder}[/bold]")
    return {**row, "choice": choice.to_dict()}


def show_choice(choice: Choice, console: Console) -> None:
    """One row a candidate, the one that was taken in bold, and a sentence."""
    table = Table(
        title=f"choice on {choice.examples} validation examples",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    table.add_column("method", no_wrap=True)
    for column in ("validation", "memory", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    for row in choice.rows:
        taken = row["method"] == choice.method
        if row["status"] == "left out":
            table.add_row(row["method"], "-", "", "", f"left out: {row['why']}", style="dim")
            continue
        early = " (ended early)" if row["status"] == "stopped" else ""
        pieces = f", {row['accumulate']} pieces a batch" if row["accumulate"] > 1 else ""
        table.add_row(
            row["method"],
            f"{100 * row['val_accuracy']:.1f} ± {100 * row['standard_error']:.1f} %",
            bytes_in_words(row["memory_bytes"]) if row["memory_bytes"] else "?",
            time_in_words(row["seconds"]),
            f"{row['why']}{early}{pieces}",
            style="bold" if taken else "",
        )
    console.print(table)
    more = " more from its trial's weights" if choice.start is not None else ""
    console.print(
        f"[bold]take[/bold]  {choice.method}, lr {choice.lr:g}, {choice.epochs} epochs{more}; the choice "
        f"took {time_in_words(choice.seconds)}",
        highlight=False,
    )
