"""`restuning predict`: images, sounds or texts labelled by one task, or by many from one forward."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from restuning.cli.common import (
    OUTPUT,
    AnyBackbone,
    Device,
    ForwardBatch,
    InTiles,
    Json,
    Random,
    Revision,
    RowStream,
    SkipBad,
    TaskBackbone,
    Text,
    Weights,
    WindowSide,
    add_heading,
    command,
    count,
    group,
    messages,
    option,
    read_tiles,
)
from restuning.cli.visible import make_visible

if TYPE_CHECKING:
    from restuning.problems import OfPixels
    from restuning.serve import Answer, Predictor

LONGEST_CELL = 60
"""Characters of a text up to which a table makes room for it."""

app = group("Label inputs.")


@command(
    app,
    "restuning predict photo.jpg --task pets.task --top 3",
    "restuning predict photos/ --tasks pets.task,scenes.task,quality.task --json",
    "restuning predict photos/ --task streets.task --out masks/",
    "restuning predict aerial.tif --task fields.task --tiles --out masks/",
    "restuning predict 'a film to remember' --task reviews.task",
    "restuning predict new.csv --task reviews.task --text review --json",
    "restuning predict photos/ --task pets.task --top 3 --out answers.csv",
    "restuning predict photo.jpg --task user/pets@v1",
)
def predict(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Images, sounds or folders of them; for a text task texts, .csv, .txt (a text a line), or -"
        ),
    ],
    task: Annotated[
        Path | None,
        typer.Option(
            help="Task folder, run folder, that of a table's columns, or a name on the hub (user/pets, user/zoo/pets)"
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Task folders, with commas; bypass tasks share one backbone forward"),
    ] = None,
    revision: Revision = None,
    skip_bad: SkipBad = False,
    tiles: InTiles = False,
    window: WindowSide = None,
    text: Text = "text",
    backbone: TaskBackbone = None,
    weights: Weights = None,
    random: Random = False,
    any_backbone: AnyBackbone = False,
    batch_size: ForwardBatch = 64,
    top: Annotated[int, option(OUTPUT, "Classes to show", min=1)] = 1,
    device: Device = None,
    out: Annotated[
        Path | None,
        option(
            OUTPUT,
            "File of answers, .csv or .jsonl: a row an input; of tasks on pixels a folder for masks, NAME.png, and "
            "NAME-overlay.jpg, or depths, NAME.npy, and NAME-depth.png",
            "--out",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Label images, sounds or texts with one task or many; a table, or one JSON line each as it is done."""
    folders = [*([task] if task else []), *(Path(t) for t in (tasks or "").split(",") if t)]
    if not folders:
        raise typer.BadParameter("give --task FOLDER or --tasks FOLDER,FOLDER,...")
    from restuning.data import say_left_out

    predictor, _ = open_predictor(
        folders,
        random,
        revision=revision,
        backbone=backbone,
        weights=weights,
        device=device,
        any_backbone=any_backbone,
        skip_bad=skip_bad,
        batch_size=batch_size,
        tiles=read_tiles(tiles, window),
    )
    if predictor.inputs.kind in ("text", "words"):
        inputs = list(_read_texts(inputs, text))
    # All of them before the first answer: the table must know how wide they are.
    single = list(predictor.inputs.expand(inputs))
    # By the option and not by the count: a script that gives --tasks gets one form of JSON always.
    several = bool(tasks) or len(predictor.tasks) > 1
    answers = predictor.stream(single)
    if out is not None and not out.suffix and (tasks_on_pixels := _find_on_pixels(predictor)):
        folder = PixelFolder(out, tasks_on_pixels, single)
        answers = map(folder.write, answers)
        _print_answers(answers, single, predictor, top, several, as_json)
        left = {"masks" if each.chooses else "depths" for each in tasks_on_pixels.values()}
        words = " and ".join(sorted(left, reverse=True))
        messages(as_json).print(add_heading(f"{words} in", str(out)), soft_wrap=True)
    elif out is not None:
        rows = _write_rows(answers, out, predictor, top, several)
        # With --json the answers are for a program, and so is what it prints of them: nothing.
        messages(as_json).print(add_heading(f"{rows:,} rows in", str(out)), soft_wrap=True)
    else:
        _print_answers(answers, single, predictor, top, several, as_json)
    if said := say_left_out(predictor.left_out):
        typer.echo(f"left out: {make_visible(said)}", err=True)
    if cut := predictor.cut:
        few = ", ".join(cut[:3]) + (", ..." if len(cut) > 3 else "")
        told = f"of {count(len(cut), 'sound')} the end was not read: {few}"
        typer.echo(make_visible(told), err=True)


def _print_answers(
    answers: Iterator[Answer],
    single: list[Any],
    predictor: Predictor,
    top: int,
    several: bool,
    as_json: bool,
) -> None:
    """Each as it is done, as JSON or as a row."""
    table = None if as_json else RowStream(_column_widths(predictor, single, top, several))
    for answer in answers:
        if table is None:
            typer.echo(json.dumps(_to_json(answer, predictor.inputs.kind, top, several)))
            continue
        for row in _table_rows(answer, predictor, top, several):
            table.row(row)
    if table is not None:
        typer.echo(
            f"{count(len(predictor.tasks), 'task')}, {count(predictor.forwards, 'backbone forward')} a batch"
        )


def _write_rows(
    answers: Iterator[Answer], out: Path, predictor: Predictor, top: int, several: bool
) -> int:
    """All of them into a file, which has its name when the last is in; how many rows it has."""
    from restuning._files import writing_rows

    kind, written = predictor.inputs.kind, 0
    with writing_rows(out) as write:
        for sentence, answer in enumerate(answers, 1):
            # Of tagged words a row each, and which sentence it is of.
            parts = answer.words if kind == "words" else [answer]
            for part in parts:
                name = (
                    {"sentence": sentence, "word": part.input}
                    if kind == "words"
                    else {kind: str(part.input)}
                )
                write({**name, **_cells(part, top, several)})
                written += 1
    return written


def _cells(answer: Answer, top: int, several: bool) -> dict[str, Any]:
    """Columns of an answer; of several tasks their names come first."""
    from restuning.problems.answers import find_cells

    return {
        f"{task} {name}" if several else name: value
        for task, said in answer.predictions.items()
        for name, value in find_cells(said, top).items()
    }


class PixelFolder:
    """Where answers with places are left: of masks `NAME.png`, its pixels the numbers of classes, and `NAME-overlay.jpg`; of depths
    `NAME.npy`, float32 in units, and `NAME-depth.png`, a picture with its scale.

    Of several such tasks each has a folder of its own.

    Args:
        folder: It may be there already.
        tasks: Problems of those with places, by name.
        inputs: All that will be answered.

    Raises:
        DataError: Images lie in the folder, two of them have one name, or a file there that is no answer of this command would
            be written over.
    """

    def __init__(self, folder: Path, tasks: Mapping[str, OfPixels], inputs: list[Any]) -> None:
        from restuning._errors import DataError

        own = next((e for e in inputs if Path(e).resolve().parent == folder.resolve()), None)
        if own is not None:
            raise DataError(
                "masks would be left among the images, over those of their name",
                where=f"--out {folder}",
                found=str(own),
                fix="give another folder",
            )
        names = Counter(Path(each).stem for each in inputs)
        twice = next((name for name, times in names.items() if times > 1), None)
        if twice is not None:
            raise DataError(
                "two images would leave their masks under one name",
                where=str(folder / f"{twice}.png"),
                found=", ".join(str(each) for each in inputs if Path(each).stem == twice),
                fix="rename one, or ask for them apart with another --out",
            )
        several = len(tasks) > 1
        self.folders = {task: folder / task if several else folder for task in tasks}
        self.ends = {task: _ENDS[problem.chooses] for task, problem in tasks.items()}
        for task, place in self.folders.items():
            end, beside = self.ends[task]
            left = {place / f"{name}{end}": place / f"{name}{beside}" for name in names}
            # Masks drawn by hand are called alike: those of this command have an overlay beside them.
            if other := [file for file, b in left.items() if file.exists() and not b.exists()]:
                raise DataError(
                    "a file would be written over that is no answer of before",
                    where=str(other[0]),
                    found=f"{len(other)} without {beside} beside them",
                    fix="give another folder",
                )

    def write(self, answer: Answer) -> Answer:
        """Leave what was answered of one image; its answer."""
        from restuning._files import write_bytes

        name = Path(answer.input).stem
        for task, folder in self.folders.items():
            end, beside = self.ends[task]
            numbers, picture = _draw(answer.input, answer[task])
            # First: by it a file is known as ours.
            write_bytes(folder / f"{name}{beside}", picture)
            write_bytes(folder / f"{name}{end}", numbers)
        return answer


_ENDS = {True: (".png", "-overlay.jpg"), False: (".npy", "-depth.png")}
"""Of the file of an answer and of the picture beside it, where it is of classes and of numbers."""


def _draw(given: Any, said: Any) -> tuple[bytes, bytes]:
    """The bytes of an answer as numbers and as a picture."""
    import io

    from restuning.backbones.images import read_image
    from restuning.problems import MaskAnswer
    from restuning.serve import depths, masks

    stream = io.BytesIO()
    if isinstance(said, MaskAnswer):
        masks.lay_over(read_image(given), said).save(stream, "JPEG", quality=90)
        return masks.to_png(said), stream.getvalue()
    depths.with_scale(said).save(stream, "PNG", optimize=True)
    return depths.to_array(said), stream.getvalue()


def _find_on_pixels(predictor: Predictor) -> dict[str, OfPixels]:
    from restuning.problems import OfPixels

    tasks = predictor.tasks.items()
    return {name: t.problem for name, t in tasks if isinstance(t.problem, OfPixels)}


def open_predictor(
    places: list[Path], random: bool, *, revision: str | None = None, **more: Any
) -> tuple[Predictor, dict[str, Path]]:
    """`Predictor.load`, with `--random` for a backbone whose weights are drawn; and the task folders, by name."""
    import torch

    from restuning.backbones import load_backbone
    from restuning.runtime.hub import named_in
    from restuning.serve import Predictor
    from restuning.serve.predictor import find_folders
    from restuning.task import describe

    # Once: a branch of a hub may move meanwhile.
    folders = find_folders(places, revision)
    if random:
        name, told = more["backbone"], None
        if name is None:
            told = next(iter(folders.values()))
            name = describe(told)["backbone"]["name"]
        # The seed of `train`, `sweep` and `cache` where none is given: the weights are theirs again.
        torch.manual_seed(0)
        with named_in(told and told / "task.json"):
            more["backbone"] = load_backbone(name, weights=more.pop("weights"), random=True)
    return Predictor.load(folders, **more), folders


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
    if kind == "words":
        given: Any = [word.input for word in answer.words]
        # A task on tagged words answers a list, a place in it for each word.
        names = answer.words[0].predictions if answer.words else ()
        by_task: dict[str, Any] = {
            task: [word[task].to_json(top) for word in answer.words] for task in names
        }
    else:
        given = str(answer.input)
        by_task = {task: said.to_json(top) for task, said in answer.predictions.items()}
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
        (said,) = answer.predictions.values()
        yield {kind: answer.input, **{f"{n}": each for n, each in enumerate(said.words(top), 1)}}


def _best_of_each(answer: Answer) -> dict[str, str]:
    return {task: said.words()[0] for task, said in answer.predictions.items()}


def _column_widths(
    predictor: Predictor, inputs: list[Any], top: int, several: bool
) -> dict[str, int]:
    """Columns of the table of answers, wide enough for every label."""
    from restuning.problems import SingleLabel

    kind = predictor.inputs.kind

    def widest(task: str) -> int:
        names = list(map(_width, predictor.labels[task]))
        if isinstance(predictor.tasks[task].problem, SingleLabel):
            return max(names) + len(" (100.0%)")
        # All of them in one cell; a longer one runs over.
        return min(LONGEST_CELL, sum(names) + len(names) * len(" (100.0%), "))

    # Long texts run over; a sentence is as wide as its longest word.
    limit = LONGEST_CELL if kind == "text" else None
    cells = (word for words in inputs for word in words) if kind == "words" else map(str, inputs)
    columns = {kind: max((_width(cell[:limit]) for cell in cells), default=0)}
    if several or kind == "words":
        return columns | {task: widest(task) for task in predictor.tasks}
    (task,) = predictor.tasks
    chosen = isinstance(predictor.tasks[task].problem, SingleLabel)
    shown = min(top, len(predictor.labels[task])) if chosen else 1
    return columns | {f"{place}": widest(task) for place in range(1, shown + 1)}


def _width(cell: str) -> int:
    return len(make_visible(cell))
