"""`restuning predict`: images or texts labelled by one task, or by many from one forward."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from restuning.cli.common import (
    OUTPUT,
    AnyBackbone,
    Device,
    ForwardBatch,
    Json,
    Random,
    Revision,
    RowStream,
    SkipBad,
    TaskBackbone,
    Text,
    Weights,
    command,
    count,
    group,
    option,
)
from restuning.cli.visible import make_visible

if TYPE_CHECKING:
    from restuning.serve import Answer, Prediction, Predictor

LONGEST_CELL = 60
"""Characters of a text up to which a table makes room for it."""

app = group("Label inputs.")


@command(
    app,
    "restuning predict photo.jpg --task pets.task --top 3",
    "restuning predict photos/ --tasks pets.task,scenes.task,quality.task --json",
    "restuning predict 'a film to remember' --task reviews.task",
    "restuning predict new.csv --task reviews.task --text review --json",
)
def predict(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Images or folders; for a text task texts, .csv, .txt (a text a line), or -"
        ),
    ],
    task: Annotated[
        Path | None, typer.Option(help="Task folder, run folder, or a name on the hub")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Task folders, with commas; bypass tasks share one backbone forward"),
    ] = None,
    revision: Revision = None,
    skip_bad: SkipBad = False,
    text: Text = "text",
    backbone: TaskBackbone = None,
    weights: Weights = None,
    random: Random = False,
    any_backbone: AnyBackbone = False,
    batch_size: ForwardBatch = 64,
    top: Annotated[int, option(OUTPUT, "Classes to show", min=1)] = 1,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Label images or texts with one task or many; a table, or one JSON line each as it is done."""
    folders = [*([task] if task else []), *(Path(t) for t in (tasks or "").split(",") if t)]
    if not folders:
        raise typer.BadParameter("give --task FOLDER or --tasks FOLDER,FOLDER,...")
    from restuning.data import say_left_out

    predictor = open_predictor(
        folders,
        random,
        revision=revision,
        backbone=backbone,
        weights=weights,
        device=device,
        any_backbone=any_backbone,
        skip_bad=skip_bad,
        batch_size=batch_size,
    )
    if predictor.inputs.kind != "image":
        inputs = list(_read_texts(inputs, text))
    # All of them before the first answer: the table must know how wide they are.
    single = list(predictor.inputs.expand(inputs))
    # By the option and not by the count: a script that gives --tasks gets one form of JSON always.
    several = bool(tasks)
    table = None if as_json else RowStream(_column_widths(predictor, single, top, several))
    for answer in predictor.stream(single):
        if table is None:
            typer.echo(json.dumps(_to_json(answer, predictor.inputs.kind, top, several)))
            continue
        for row in _table_rows(answer, predictor, top, several):
            table.row(row)
    if table is not None:
        typer.echo(
            f"{count(len(folders), 'task')}, {count(predictor.forwards, 'backbone forward')} a batch"
        )
    if said := say_left_out(predictor.left_out):
        typer.echo(f"left out: {make_visible(said)}", err=True)


def open_predictor(folders: list[Path], random: bool, **more: Any) -> Predictor:
    """`Predictor.load`, with `--random` for a backbone whose weights are drawn."""
    import torch

    from restuning.backbones import load_backbone
    from restuning.runtime.hub import named_in
    from restuning.serve import Predictor
    from restuning.task import describe, find_task

    if random:
        name, told = more["backbone"], None
        if name is None:
            told = find_task(folders[0], more["revision"])
            name = describe(told)["backbone"]["name"]
        # The seed of `train`, `sweep` and `cache` where none is given: the weights are theirs again.
        torch.manual_seed(0)
        with named_in(told and told / "task.json"):
            more["backbone"] = load_backbone(name, weights=more.pop("weights"), random=True)
    return Predictor.load(folders, **more)


def _read_texts(inputs: list[str], column: str) -> Iterator[str]:
    """Every text behind what was given: files as their texts, `-` as the standard input's lines.

    Raises:
        DataError: It is a folder, or a file of another kind: its name would be labelled as a text.
    """
    from restuning._errors import DataError
    from restuning.data.texts import TABLES
    from restuning.serve import file_texts

    lines: list[str] | None = None
    for each in inputs:
        if each == "-":
            # It can be read once only.
            lines = _read_standard_input() if lines is None else lines
            yield from lines
        elif Path(each).suffix.lower() in (*TABLES, ".txt"):
            yield from file_texts(Path(each), column)
        elif os.path.exists(each):
            raise DataError(
                "a folder, or a file that is not read as texts",
                where=each,
                fix="give a .csv, .tsv or .txt file; a text that is called so as well, by -",
            )
        else:
            yield each


def _read_standard_input() -> list[str]:
    from restuning.data.text_files import decode_text, split_lines

    # As a file is read, whatever the terminal's encoding is.
    content = getattr(sys.stdin, "buffer", None)
    text = sys.stdin.read() if content is None else decode_text(content.read(), Path("stdin"))
    return split_lines(text)


def _to_json(answer: Answer, kind: str, top: int, several: bool) -> dict[str, Any]:
    """One line of `--json`: all tasks by name, or the predictions of the only one."""

    def best(prediction: Prediction) -> list[dict[str, Any]]:
        return [choice._asdict() for choice in prediction.top(top)]

    if kind == "words":
        given: Any = [word.input for word in answer.words]
        # A task on tagged words answers a list, a place in it for each word.
        names = answer.words[0].predictions if answer.words else ()
        by_task: dict[str, Any] = {
            task: [best(word[task]) for word in answer.words] for task in names
        }
    else:
        given = str(answer.input)
        by_task = {task: best(prediction) for task, prediction in answer.predictions.items()}
    if several:
        return {kind: given, "tasks": by_task}
    return {kind: given, "predictions": next(iter(by_task.values()), [])}


def _table_rows(
    answer: Answer, predictor: Predictor, top: int, several: bool
) -> Iterator[dict[str, Any]]:
    """Rows of the table: a line an input, or a line a word and an empty one as a file has it."""
    kind = predictor.inputs.kind
    if kind == "words":
        for word in answer.words:
            yield {kind: word.input, **_best_of_each(word)}
        yield dict.fromkeys([kind, *predictor.tasks], "")
    elif several:
        yield {kind: answer.input, **_best_of_each(answer)}
    else:
        best = (f"{label} ({probability:.1%})" for label, probability in answer.top(top))
        yield {kind: answer.input, **{f"{place}": each for place, each in enumerate(best, 1)}}


def _best_of_each(answer: Answer) -> dict[str, str]:
    return {task: f"{p.label} ({p.probability:.1%})" for task, p in answer.predictions.items()}


def _column_widths(
    predictor: Predictor, inputs: list[Any], top: int, several: bool
) -> dict[str, int]:
    """Columns of the table of answers, wide enough for every label."""
    kind = predictor.inputs.kind

    def widest(task: str) -> int:
        return max(map(_width, predictor.labels[task])) + len(" (100.0%)")

    # Long texts run over; a sentence is as wide as its longest word.
    limit = LONGEST_CELL if kind == "text" else None
    cells = (word for words in inputs for word in words) if kind == "words" else map(str, inputs)
    columns = {kind: max((_width(cell[:limit]) for cell in cells), default=0)}
    if several or kind == "words":
        return columns | {task: widest(task) for task in predictor.tasks}
    (task,) = predictor.tasks
    shown = min(top, len(predictor.labels[task]))
    return columns | {f"{place}": widest(task) for place in range(1, shown + 1)}


def _width(cell: str) -> int:
    return len(make_visible(cell))
