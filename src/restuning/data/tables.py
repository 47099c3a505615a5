"""Tables: a column of images, sounds or texts, and one column of answers or more, of any kind.

A csv or parquet file, a folder of them with a file for each split (of parquet also many a split, and by URL), a data set of
Hugging Face's (`data/hub_sets.py`), a pandas frame, columns by name, or dictionaries one an example. Each column of answers is a data set of its own on the same inputs and the same splits.
"""

from __future__ import annotations

import bisect
import math
import numbers
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from restuning._errors import DataError
from restuning._files import expand_home, lies_inside
from restuning.backbones.images import image_suffixes
from restuning.backbones.preprocessing import Preprocessing
from restuning.data.data import (
    CACHED_PIXELS,
    SPLIT_SEED,
    Arrays,
    Data,
    DataOptions,
    ImageDataset,
    ImageFiles,
    name_of,
    split_by_class,
)
from restuning.data.depths import Depths
from restuning.data.embedded import as_embedding
from restuning.data.hub_sets import HubSet, is_hub_set, open_hub_set
from restuning.data.identity import LABEL_COLUMNS
from restuning.data.labels import trim_labels, warn_of_look_alikes, warn_of_untrained
from restuning.data.listing import CORRUPT, has_folders_of
from restuning.data.masks import Masks, find_classes, no_masks
from restuning.data.media import (
    FILES,
    IMAGES,
    SOUNDS,
    Media,
    describe_inputs,
    drop_corrupt,
    make_whole,
    media_of,
    open_files,
    open_values,
    with_preprocessing,
)
from restuning.data.parquet import find_parquets, read_columns, read_header
from restuning.data.parquet_images import ImageCells
from restuning.data.pixels import (
    ImagesWithTargets,
    PixelTargets,
    check_targets,
    make_problem,
    refuse_other_reading,
    say_turned,
)
from restuning.data.remote import is_url
from restuning.data.shards import Shards
from restuning.data.stored_images import StoredImages
from restuning.data.text_files import list_columns, read_cells, writes_decimal_commas
from restuning.data.texts import PARTS, TABLES, find_files, refuse_empty, require_tokenizer
from restuning.data.tokens import TextBatch
from restuning.problems import (
    Depth,
    Embedding,
    MultiLabel,
    Problem,
    Regression,
    Segmentation,
    SingleLabel,
    kinds,
)

if TYPE_CHECKING:
    from restuning.backbones import Backbone

SEPARATORS = "|;"
"""Between the tags of a cell."""
ROUNDING = 1e-3
"""Of a column's deviation that its numbers may lose in float32, in which they are trained on."""
NUMBERED = (*LABEL_COLUMNS, "cls")
"""Columns of Hugging Face's data sets whose whole numbers are classes; the last is that of tars as webdataset writes them."""
NUMPY = ".npy"
"""Of a file that holds an array."""


@dataclass(frozen=True)
class Table:
    """Columns of a table that are read, all rows of all splits one after the other.

    Attributes:
        name: Of the data set.
        columns: Cells by column.
        splits: Row numbers of "train", "val" and "test"; "whole" of rows from which those that are not there are drawn.
        shown: What a row is called in an error: its file and line.
        root: Folder that paths of images are relative to, and that they may not leave; None for paths of a program.
        decimal: Whether numbers may be written with a comma.
        remote: Whether it lies at a URL: then it names no files.
        classes: Names of classes in their order, by column, where the table says them; cells are names then.
        kinds: Kinds of answers, by column, that follow from more than the cells; and from what, in words.
    """

    name: str
    columns: Mapping[str, Sequence[Any]]
    splits: Mapping[str, Sequence[int]]
    shown: Callable[[int], str]
    root: Path | None = None
    decimal: bool = False
    remote: bool = False
    classes: Mapping[str, list[str]] = field(default_factory=dict)
    kinds: Mapping[str, tuple[str, str]] = field(default_factory=dict)


def is_columns(data: Any) -> bool:
    """Whether it is a pandas frame, columns by name, or dictionaries one an example."""
    if isinstance(data, Mapping):
        return bool(data) and all(
            isinstance(v, Sequence | np.ndarray | Tensor) for v in data.values()
        )
    if isinstance(data, list | tuple):
        return bool(data) and all(isinstance(each, Mapping) for each in data)
    return _is_frame(data)


def find_table(name: Any, backbone: Backbone, options: DataOptions) -> bool:
    """Whether data are read as a table here, and not as a csv of one text and one class a row."""
    if is_columns(name) or is_hub_set(name):
        return True
    if not isinstance(name, str | Path):
        return find_parquets(name) is not None
    path = expand_home(name)
    # An embedding is asked of classes wherever they stand.
    asked = options.problem not in (None, Embedding.kind)
    asked = asked or options.image is not None or options.audio is not None
    several = not isinstance(options.label, str) or "," in options.label
    if backbone.preprocessing is not None:
        # Beside class folders a table may be anybody's notes.
        named = asked or options.label != DataOptions().label
        if not named and has_class_folders(path, backbone):
            return False
        asked = True
    if find_parquets(name) is not None:
        return True
    return bool(find_files(path, TABLES)) and (asked or several)


def has_class_folders(path: Path, backbone: Backbone) -> bool:
    """Whether a folder holds two folders of the backbone's inputs or more, or a split's folder that does."""
    preprocessing = backbone.preprocessing
    media = IMAGES if preprocessing is None else media_of(preprocessing)
    return has_folders_of(path, media.suffixes())


def split_label(label: str | Sequence[str], columns: Sequence[str]) -> list[str]:
    """The columns of answers that are asked for: names, or one text with commas between them."""
    if isinstance(label, str):
        label = [label] if label in columns else [each.strip() for each in label.split(",")]
    twice = next((c for c in label if list(label).count(c) > 1), None)
    if twice is not None:
        raise DataError(
            "a column of answers is named twice",
            where="label",
            found=twice,
            fix="name each once",
        )
    return list(label)


def load_columns(name: Any, backbone: Backbone, options: DataOptions) -> dict[str, Data]:
    """A data set for each column of answers, on the same inputs in the same splits.

    Args:
        name: A csv or parquet file or a folder of them, a data set of Hugging Face's, a pandas frame, a mapping of columns,
            or a list of mappings.
        backbone: Whose preprocessing or tokenizer is used.
        options: `image`, `audio` or `text` names the column of inputs, `label` those of answers, `problem` their kinds.

    Raises:
        DataError: A column is missing, a cell is no answer of its kind (file and row are named), an image or a sound is not
            there, or there are too few rows.
    """
    if options.problem == Embedding.kind:
        plain = load_columns(name, backbone, replace(options, problem=None, dimensions=None))
        return {column: as_embedding(data, options.dimensions) for column, data in plain.items()}
    backbone = with_preprocessing(backbone, options)
    source, answers, table = _read(name, backbone, options)
    said = _read_problems(options.problem, answers)
    kept, files, left_out = _keep_readable(table, source, backbone, options)
    splits = _split(table, kept)
    for split, rows in splits.items():
        if not rows:
            raise DataError(
                "a split of a table has no rows",
                where=f"{table.name}, {split}",
                found=f"{sum(map(len, kept.values()))} rows in all",
                fix="give more rows",
            )
    rows = [n for each in kept.values() for n in each]
    made: dict[str, Data] = {}
    asked = {c: _find_kind(table, c, said.get(c), rows, len(answers) > 1) for c in answers}
    if options.classes is not None and all(k != Segmentation.kind for k, _ in asked.values()):
        raise no_masks(table.name, options)
    preprocessing = backbone.preprocessing
    if preprocessing is not None and (
        options.whole or any(k in _OF_PIXELS for k, _ in asked.values())
    ):
        # One pass serves all columns: where one of them is of pixels, images are whole for all.
        preprocessing = make_whole(preprocessing, table.name)
        backbone = replace(backbone, preprocessing=preprocessing)
    for column, (kind, assumed) in asked.items():
        if kind in _OF_PIXELS:
            targets = _make_targets(kind, table, column, options)
            made[column] = _build_of_pixels(
                table, source, files, column, targets, splits, backbone, options
            )
            made[column].assumed = "; ".join(filter(None, (assumed, made[column].assumed)))
        else:
            found = _Answers(column, kinds()[kind], *_READERS[kind](table, column, rows), assumed)
            _check_trained(found, splits, table, drawn="whole" in kept)
            made[column] = _build(table, source, files, found, splits, backbone, options)
        if isinstance(preprocessing, Preprocessing) and preprocessing == preprocessing.whole():
            made[column].notes = {"preprocessing": preprocessing.to_dict()}
        made[column].left_out = {CORRUPT: left_out} if left_out else {}
        made[column].source = source
    return made


def load_rows(
    name: Any, backbone: Backbone, options: DataOptions
) -> tuple[Data, Callable[[int], str]]:
    """All rows of a table of one file as the training split, a class each, and what each is called in an error.

    Args:
        name: As for `load_columns`.
        backbone: Likewise.
        options: Likewise, of one column of answers.

    Raises:
        DataError: As `load_columns`; or several columns of answers are named.
    """
    backbone = with_preprocessing(backbone, options)
    source, answers, table = _read(name, backbone, options)
    if len(answers) > 1:
        raise DataError(
            "several columns of answers are several tasks",
            where="label",
            found=", ".join(answers),
            fix="give one: --label COLUMN (label=COLUMN), with the task that was trained on it",
        )
    kept, files, left_out = _keep_readable(table, source, backbone, options)
    rows = kept["whole"]
    kind = SingleLabel.kind
    # Of classes that are named and not there nothing is added.
    table = replace(table, classes={})
    found = _Answers(
        answers[0], kinds()[kind], *_READERS[kind](table, answers[0], rows), assumed=""
    )
    data = _build(table, source, files, found, {"train": rows}, backbone, options)
    data.left_out = {CORRUPT: left_out} if left_out else {}
    return data, lambda n: table.shown(rows[n])


@dataclass(frozen=True)
class _Answers:
    """A column of answers as targets of a problem, by row."""

    column: str
    kind: type[Problem]
    targets: Mapping[int, Any]
    labels: list[str]
    assumed: str

    def used(self, rows: Iterable[int]) -> set[int]:
        """Numbers of the classes or labels that rows have."""
        if issubclass(self.kind, SingleLabel):
            return {int(self.targets[n]) for n in rows}
        if issubclass(self.kind, MultiLabel):
            return {int(y) for n in rows for y in self.targets[n].nonzero()}
        return set()


def _check_trained(
    answers: _Answers, splits: Mapping[str, Sequence[int]], table: Table, drawn: bool
) -> None:
    """Refuse or name classes that no training row has.

    Raises:
        DataError: There is one class, or a file for judging has what that for training has not.
    """
    trained, where = answers.used(splits["train"]), f"{table.name}, column {answers.column}"
    if issubclass(answers.kind, Regression):
        return
    if issubclass(answers.kind, SingleLabel) and len(trained) < 2:
        raise DataError(
            "a classification needs two classes",
            where=where,
            found=f"{len(trained)} in {len(splits['train'])} training rows",
            fix="check the column, or give more rows",
        )
    others = [n for split, rows in splits.items() if split != "train" for n in rows]
    unknown = answers.used(others) - trained
    # Of a class that the table itself names it is only told.
    if unknown and not drawn and answers.column not in table.classes:
        raise DataError(
            "classes that training does not have",
            where=where,
            found=", ".join(answers.labels[y] for y in sorted(unknown)[:5]),
            fix="correct the column",
        )
    warn_of_untrained(answers.labels, trained, where)


def _read(name: Any, backbone: Backbone, options: DataOptions) -> tuple[str, list[str], Table]:
    """The column of inputs, those of answers, and the table with these."""
    if is_hub_set(name):
        return _read_hub_set(open_hub_set(name), backbone, options)
    if is_columns(name):
        there, columns = _as_columns(name)
        source, answers = _choose_columns(there, backbone, options, "the table")
        lengths = {c: len(columns[c]) for c in [source, *answers]}
        if len(set(lengths.values())) > 1:
            raise DataError(
                "columns of a table have other lengths",
                where="the table",
                found=", ".join(f"{c}: {n}" for c, n in lengths.items()),
                fix="give as many cells in each",
            )
        rows = range(lengths[source])
        table = Table("table", columns, {"whole": rows}, lambda n: f"row {n} of the table")
        return source, answers, table
    if (shards := find_parquets(name)) is not None:
        return _read_parquets(shards, backbone, options)
    path = expand_home(name)
    files = find_files(path, TABLES)
    first = next(iter(files.values()))
    source, answers = _choose_columns(list_columns(first), backbone, options, str(first))
    cells: dict[str, list[Any]] = {name: [] for name in [source, *answers]}
    places: list[str] = []
    splits: dict[str, range] = {}
    for split, file in files.items():
        start = len(places)
        for line, row in read_cells(file, list(cells)):
            places.append(f"{file}, line {line}")
            for column, values in cells.items():
                values.append(row[column])
        splits[split] = range(start, len(places))
    refuse_empty(files, splits)
    root = path if path.is_dir() else path.parent
    decimal = all(writes_decimal_commas(f, list(cells)) for f in files.values())
    table = Table(name_of(path), cells, splits, places.__getitem__, root, decimal)
    return source, answers, table


def _read_parquets(
    shards: Shards, backbone: Backbone, options: DataOptions
) -> tuple[str, list[str], Table]:
    """As `_read`; images stay in their files, and of other columns the cells are read."""
    files = [file for several in shards.splits.values() for file in several]
    headers = {file: read_header(file) for file in files}
    first = headers[files[0]]
    chosen = _with_label_of(first.names, first.classes, options)
    source, answers = _choose_columns(
        first.names, backbone, chosen, str(files[0]), list(first.held)
    )
    lazy = (
        backbone.preprocessing is not None
        and media_of(backbone.preprocessing) is IMAGES
        and source in first.held
    )
    wanted = [*answers] if lazy else [source, *answers]
    remote = any(is_url(file.name) for file in files)
    if remote and backbone.preprocessing is not None and source not in first.held:
        media = media_of(backbone.preprocessing)
        raise DataError(
            f"a table at a URL holds no {media.nouns} but their names",
            where=f"{files[0]}, column {source}",
            found="a column that is not of bytes",
            fix=f"write the bytes of {media.nouns} into a column, or copy the table and its files to a disk",
        )
    cells: dict[str, Any] = {column: [] for column in wanted}
    splits: dict[str, range] = {}
    firsts, count = [], 0
    for split, several in shards.splits.items():
        start = count
        for file in several:
            _check_there(headers[file].names, [source, *answers], str(file))
            found = read_columns(file, wanted)
            for column, values in cells.items():
                names = headers[file].classes.get(column)
                if column in answers and names != first.classes.get(column):
                    raise DataError(
                        "a file names other classes than the first",
                        where=f"{file}, column {column}",
                        found=f"{str(names)[:80]}, the first: {str(first.classes.get(column))[:80]}",
                        fix="write all files with one schema",
                    )
                values += found[column]
            firsts.append(count)
            count += sum(headers[file].rows)
        splits[split] = range(start, count)
        if start == count:
            raise DataError(
                "a file of a data set has no rows",
                where=str(several[0]),
                found="a header at most",
                fix="fill it, or remove the file",
            )
    if lazy:
        cells[source] = ImageCells(files, [shards.names[f] for f in files], headers, source)

    def show(row: int) -> str:
        number = bisect.bisect_right(firsts, row) - 1
        return f"{files[number]}, row {row - firsts[number]}"

    root = (
        None
        if remote
        else Path(os.path.commonpath([Path(f.name).absolute().parent for f in files]))
    )
    table = Table(shards.name, cells, splits, show, root, remote=remote)
    return source, answers, _name_classes(table, first.classes, answers, options)


def _read_hub_set(
    found: HubSet, backbone: Backbone, options: DataOptions
) -> tuple[str, list[str], Table]:
    """As `_read`; images stay in the data set's own files, and of other columns the cells are read."""
    chosen = _with_label_of(found.names, found.classes, options, NUMBERED)
    media = None if backbone.preprocessing is None else media_of(backbone.preprocessing)
    held = {None: [], IMAGES: found.pictures, SOUNDS: found.sounds}[media]
    source, answers = _choose_columns(found.names, backbone, chosen, found.name, held)
    found.require_columns([source, *answers])
    columns: dict[str, Sequence[Any]] = {column: found.read(column) for column in answers}
    lazy = media is IMAGES and source not in found.texts
    columns[source] = found.images(source) if lazy else found.read(source)
    # As these data sets number their classes, and mark with -1 the rows of a split that keeps them to itself.
    numbered = [c for c in answers if c in found.numbered and c in NUMBERED]
    for column in numbered:
        columns[column] = [None if cell == -1 else cell for cell in columns[column]]
    kinds = {c: (SingleLabel.kind, f"whole numbers in a column `{c}`") for c in numbered}
    table = Table(
        found.name, columns, found.splits(), found.shown, kinds=kinds, remote=found.fetched
    )
    return source, answers, _name_classes(table, found.classes, answers, options)


def _with_label_of(
    names: Sequence[str],
    classes: Mapping[str, list[str]],
    options: DataOptions,
    usual: Sequence[str] = LABEL_COLUMNS,
) -> DataOptions:
    """The options with the column of classes that a table says, where none is named and none is called `label`."""
    if options.label != DataOptions().label or options.label in names:
        return options
    there = [c for c in usual if c in names] or list(classes)
    # Of several by their usual names as hub sets take them; of others nobody knows which.
    known = there[0] in usual if there else False
    return replace(options, label=there[0]) if known or len(there) == 1 else options


def _name_classes(
    table: Table, classes: Mapping[str, list[str]], answers: Sequence[str], options: DataOptions
) -> Table:
    """A table with numbers of classes as their names, where it has these; -1, which hubs write where there is none, as nothing.

    Raises:
        DataError: A number is that of no class.
    """
    said = _read_problems(options.problem, answers)
    columns, known = dict(table.columns), {}
    for column in answers:
        names, cells = classes.get(column), columns[column]
        # Asked for as numbers they are numbers.
        if names is None or said.get(column) == Regression.kind:
            continue
        if not all(map(_is_numbered, cells)):
            continue
        wrong = next(
            (n for n, y in enumerate(cells) if y is not None and not _are_of(y, len(names))), None
        )
        if wrong is not None:
            raise DataError(
                "a number of a class is none of those that its file names",
                where=f"{table.shown(wrong)}, column {column}",
                found=f"{cells[wrong]} of {len(names)} classes",
                fix="correct it, or write the file again with all names",
            )
        columns[column] = [_named(y, names) for y in cells]
        known[column] = list(dict.fromkeys(names))
    return replace(table, columns=columns, classes=known)


def _is_numbered(cell: Any) -> bool:
    """Whether it is the number of a class, a list of them, or nothing."""
    several = cell if isinstance(cell, list) else [cell]
    return cell is None or all(type(each) is int for each in several)


def _are_of(cell: Any, count: int) -> bool:
    if isinstance(cell, list):
        return all(0 <= y < count for y in cell)
    return bool(-1 <= cell < count)


def _named(cell: Any, names: Sequence[str]) -> Any:
    if isinstance(cell, list):
        return [names[y] for y in cell]
    return None if cell is None or cell < 0 else names[cell]


def _is_frame(data: Any) -> bool:
    return any(
        c.__module__.partition(".")[0] == "pandas" and c.__name__ == "DataFrame"
        for c in type(data).__mro__
    )


def _as_columns(data: Any) -> tuple[list[str], dict[str, Sequence[Any]]]:
    """All names, of which one may be there twice, and the cells."""
    if _is_frame(data):
        # By place: by its name a column that is there twice would be a frame.
        columns = [(str(name), data.iloc[:, n].tolist()) for n, name in enumerate(data.columns)]
        return [name for name, _ in columns], dict(columns)
    if isinstance(data, Mapping):
        return list(map(str, data)), {str(name): values for name, values in data.items()}
    names = list(data[0])
    for number, each in enumerate(data):
        if list(each) != names and set(each) != set(names):
            raise DataError(
                "an example has other names than the first",
                where=f"example {number}",
                found=f"{list(each)[:6]}, the first has {names[:6]}",
                fix="give all of them the same names",
            )
    return list(map(str, names)), {str(name): [each[name] for each in data] for name in names}


def _choose_columns(
    there: Sequence[str],
    backbone: Backbone,
    options: DataOptions,
    where: str,
    held: Sequence[str] = (),
) -> tuple[str, list[str]]:
    """The column of inputs, and those of answers; `held` are those of bytes, which may be inputs of any name."""
    answers = split_label(options.label, there)
    media = None if backbone.preprocessing is None else media_of(backbone.preprocessing)
    named = {"image": options.image, "audio": options.audio}
    for kind, column in named.items():
        if column is not None and (media is None or media.kind != kind):
            takes = "texts" if media is None else media.nouns
            raise DataError(
                f"a column of another kind than the backbone's inputs: --{kind} {column}",
                where=where,
                found=f"backbone {backbone.name}, which takes {takes}",
                fix=f"name it with {'--text' if media is None else media.option}, or give another backbone",
            )
    source = (named[media.kind] if media is not None else None) or options.text
    if media is not None and named[media.kind] is None:
        known = [c for c in media.columns if c in there and c not in answers]
        if of_bytes := [c for c in held if c not in answers]:
            # A file's name beside its bytes says where they came from.
            known = (
                [c for c in known if c in of_bytes]
                or [c for c in known if c not in FILES]
                or of_bytes
            )
        if len(known) != 1:
            raise DataError(
                f"which column of a table holds the {media.nouns}?",
                where=where,
                found=f"columns {list(there)[:8]}",
                fix=f"name it: {media.option} COLUMN ({media.kind}=COLUMN); of texts give a language backbone",
            )
        source = known[0]
    _check_there(there, [source, *answers], where)
    if source in answers:
        raise DataError(
            "a column is input and answer at once",
            where=where,
            found=source,
            fix="name the columns of answers with --label (label=...)",
        )
    return source, answers


def _check_there(there: Sequence[str], wanted: Sequence[str], where: str) -> None:
    missing = [c for c in wanted if c not in there]
    if missing:
        raise DataError(
            "a table lacks a column",
            where=where,
            found=f"columns {list(there)[:8]}, wanted {', '.join(map(repr, missing))}",
            fix="name them with --image, --audio or --text, and --label",
        )
    twice = next((c for c in wanted if there.count(c) > 1), None)
    if twice is not None:
        raise DataError(
            "a table has a column twice",
            where=where,
            found=f"{twice!r} in {list(there)[:8]}",
            fix="rename or remove one of them",
        )


# Inputs.


def _keep_readable(
    table: Table, source: str, backbone: Backbone, options: DataOptions
) -> tuple[dict[str, list[int]], dict[int, Path], list[str]]:
    """Rows of each split whose inputs are there, their files by row, and what was left out."""
    kept = {split: list(rows) for split, rows in table.splits.items()}
    if backbone.preprocessing is None:
        return kept, {}, []
    cells, media = table.columns[source], media_of(backbone.preprocessing)
    if isinstance(cells, StoredImages):
        return _keep_images(kept, cells, options)
    files = {
        n: _locate(table, cells[n], n, media)
        for rows in kept.values()
        for n in rows
        if _is_path(cells[n])
    }
    if options.skip_bad:
        good, bad = drop_corrupt([(path, n) for n, path in files.items()], backbone.preprocessing)
        readable = {n for _, n in good}
        kept = {s: [n for n in rows if n not in files or n in readable] for s, rows in kept.items()}
        return kept, files, [str(path) for path in bad]
    for n, path in files.items():
        if not _is_there(path):
            raise _lost(table, n, cells[n], media)
    return kept, files, []


def _keep_images(
    kept: Mapping[str, list[int]], cells: StoredImages, options: DataOptions
) -> tuple[dict[str, list[int]], dict[int, Path], list[str]]:
    """As `_keep_readable`, of images that stay where they lie."""
    if not options.skip_bad:
        if cells.missing:
            raise cells.is_missing(min(cells.missing))
        return dict(kept), {}, []
    good, bad = {}, []
    for split, rows in kept.items():
        good[split], more = cells.drop_corrupt(rows)
        bad += more
    return good, {}, [cells.id(row) for row in bad]


def _is_there(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        # Of a long text: longer than a name may be.
        return False


def _lost(
    table: Table, row: int, cell: Any, media: Media = IMAGES, column: str | None = None
) -> DataError:
    skipped = ", or leave such rows out with --skip-bad" if column is None else ""
    return DataError(
        f"{media.noun} of a table is not there",
        where=_say_where(table, row, column),
        found=str(cell)[:200],
        fix=f"correct the path (it is relative to the table's folder){skipped}",
    )


def _say_where(table: Table, row: int, column: str | None) -> str:
    return table.shown(row) if column is None else f"{table.shown(row)}, column {column}"


def _as_value(cell: Any) -> Any:
    """A cell as readers take it: Hugging Face keeps a file's bytes beside its path, or samples beside their rate."""
    if isinstance(cell, Mapping) and isinstance(cell.get("bytes"), bytes):
        return cell["bytes"]
    if isinstance(cell, Mapping) and {"array", "sampling_rate"} <= cell.keys():
        return np.asarray(cell["array"], np.float32), cell["sampling_rate"]
    return cell


def _is_path(cell: Any) -> bool:
    return isinstance(cell, str | Path)


def _locate(
    table: Table, cell: str | Path, row: int, media: Media = IMAGES, column: str | None = None
) -> Path:
    """The file that a cell names; `column` is that of answers, None that of the inputs."""
    if not str(cell).strip():
        raise DataError(
            f"a row of a table names no {media.noun.partition(' ')[2]}",
            where=_say_where(table, row, column),
            found="an empty cell",
            fix="give its path, or remove the row",
        )
    if table.remote:
        raise DataError(
            f"a table at a URL names {media.noun} by a path",
            where=_say_where(table, row, column),
            found=str(cell)[:200],
            fix="write its bytes into the table, or copy the table and its files to a disk",
        )
    if table.root is None:
        return expand_home(cell)
    path = table.root / str(cell).strip()
    try:
        inside = lies_inside(path, table.root)
    except ValueError:
        # With a zero in it.
        raise _lost(table, row, cell, media, column) from None
    # A table from elsewhere could name any file of this machine.
    if not inside:
        raise DataError(
            f"{media.noun} of a table lies outside of its folder",
            where=_say_where(table, row, column),
            found=str(cell)[:200],
            fix="write paths relative to the folder of the table, or give a pandas frame in Python",
        )
    return path


def _build(
    table: Table,
    source: str,
    files: Mapping[int, Path],
    answers: _Answers,
    splits: Mapping[str, Sequence[int]],
    backbone: Backbone,
    options: DataOptions,
) -> Data:
    cells, targets = table.columns[source], answers.targets
    train = list(splits["train"])
    val, test = splits.get("val"), splits.get("test")
    joined = [*train, *(val or [])] if options.final else train
    problem: Problem
    if issubclass(answers.kind, Regression):
        problem = Regression.of(torch.stack([targets[n] for n in joined]))
    else:
        problem = answers.kind()
    more: dict[str, Any] = {"problem": problem, "beside": True}
    if backbone.preprocessing is None:
        collate = TextBatch(require_tokenizer(table.name, backbone), options.max_tokens, table=True)
        for n in (n for rows in splits.values() for n in rows):
            if not isinstance(cells[n], str):
                raise DataError(
                    "a cell of texts is none",
                    where=table.shown(n),
                    found=repr(cells[n])[:80],
                    fix="give a text, or name another column with --text",
                )

        def read(rows: Sequence[int], policy: str) -> Any:
            return [(cells[n], targets[n]) for n in rows]

        more |= {
            "kind": collate.kind,
            "collate": collate,
            "notes": {"preprocessing": collate.to_dict()},
        }
    else:
        preprocessing = backbone.preprocessing
        named = _all_files(splits, files)

        def read(rows: Sequence[int], policy: str) -> Any:
            own = [targets[n] for n in rows]
            if named is not None:
                files = [(named[n], y) for n, y in zip(rows, own, strict=True)]
                return open_files(files, preprocessing, policy)
            if isinstance(cells, StoredImages) and isinstance(preprocessing, Preprocessing):
                # All of them or none: of a long pass the first would only take memory.
                keep = (
                    policy == "none"
                    and len(rows) * 3 * math.prod(preprocessing.size) <= CACHED_PIXELS
                )
                return cells.open(rows, own, preprocessing.transform(policy), keep)
            return open_values([_as_value(cells[n]) for n in rows], own, preprocessing, policy)

        more |= describe_inputs(preprocessing)

    data = Data(
        table.name,
        read(joined, options.augment),
        None if options.final or not val else read(val, "none"),
        read(test, "none") if test else None,
        answers.labels,
        **more,
    )
    data.assumed = answers.assumed
    return data


def _all_files(
    splits: Mapping[str, Sequence[int]], files: Mapping[int, Path]
) -> Mapping[int, Path] | None:
    """The files of the images by row; None where one of them is none."""
    return files if all(n in files for rows in splits.values() for n in rows) else None


def _read_images(
    rows: Sequence[int],
    cells: Sequence[Any],
    files: Mapping[int, Path] | None,
    targets: Sequence[Any],
    transform: Callable[[Any], Tensor],
    keep: bool,
) -> ImageDataset:
    if isinstance(cells, StoredImages):
        return cells.open(rows, targets, transform, keep)
    if files is not None:
        named = [files[n] for n in rows]
        return ImageFiles(list(zip(named, targets, strict=True)), transform, keep)
    return Arrays([_as_value(cells[n]) for n in rows], targets, transform, keep)


def _build_of_pixels(
    table: Table,
    source: str,
    files: Mapping[int, Path],
    column: str,
    kind: PixelTargets,
    splits: Mapping[str, Sequence[int]],
    backbone: Backbone,
    options: DataOptions,
) -> Data:
    preprocessing = backbone.preprocessing
    if not isinstance(preprocessing, Preprocessing):
        takes = "language backbone" if preprocessing is None else "backbone of sounds"
        raise DataError(
            f"a column of {kind.noun}s asks for images",
            where=f"{table.name}, column {column}",
            found=f"the {takes} {backbone.name}",
            fix="give an image backbone, and --image COLUMN",
        )
    refuse_other_reading(options, f"{table.name}, column {column}")
    images, cells = table.columns[source], table.columns[column]
    named, own, names, checked = _all_files(splits, files), {}, {}, {}
    for n in (n for rows in splits.values() for n in rows):
        where = _say_where(table, n, column)
        if _is_empty(cells[n]):
            raise DataError(
                f"a row of a table has no {kind.noun}",
                where=where,
                found=repr(cells[n]),
                fix="give its path, or remove the row",
            )
        cell = cells[n].numpy() if isinstance(cells[n], Tensor) else cells[n]
        own[n], names[n] = _as_value(cell), where
        if _is_path(cells[n]):
            own[n] = _locate(table, cells[n], n, column=column)
            if not _is_there(own[n]):
                raise _lost(table, n, cells[n], column=column)
            names[n] = f"{where}: {cells[n]}"
    for split, rows in splits.items():
        found = check_targets(
            kind,
            images.pick(rows)
            if isinstance(images, StoredImages)
            else [_as_value(images[n]) if named is None else named[n] for n in rows],
            [own[n] for n in rows],
            [names[n] for n in rows],
        )
        checked[split] = dict(zip(rows, found, strict=True))
    val, test = splits.get("val"), splits.get("test")
    joined = [*splits["train"], *(val or [])] if options.final else list(splits["train"])
    of_all = {n: found for each in checked.values() for n, found in each.items()}
    problem = make_problem(kind, [of_all[n] for n in joined], f"{table.name}, column {column}")

    def read(rows: Sequence[int], flip: bool = False) -> ImagesWithTargets:
        shown = _read_images(rows, images, named, [0] * len(rows), preprocessing.image, False)
        targets = [own[n] for n in rows]
        return ImagesWithTargets(
            shown, targets, [names[n] for n in rows], kind, preprocessing, flip
        )

    data = Data(
        table.name,
        read(joined, options.augment == "flip"),
        None if options.final or not val else read(val),
        read(test) if test else None,
        kind.labels,
        problem=problem,
        beside=True,
    )
    height, width = preprocessing.size
    data.assumed = f"{column}: images are resized whole to {width} x {height}"
    data.assumed += say_turned(kind, [names[n] for n, found in of_all.items() if found.turned])
    return data


def _make_targets(kind: str, table: Table, column: str, options: DataOptions) -> PixelTargets:
    if kind == Depth.kind:
        return Depths(column)
    return Masks(find_classes(options.classes, table.root))


def _split(table: Table, kept: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """Rows by split; of one file 70 : 10 : 20, and 80 : 20 where the validation split was brought."""
    if "whole" not in kept:
        return dict(kept)
    rows = kept["whole"]
    brought = {split: own for split, own in kept.items() if split != "whole"}
    names = [each for each in PARTS if each not in brought]
    # Not class by class: whichever columns are asked for, the rows that are tested are the same.
    parts = split_by_class([0] * len(rows), (0.8,) if brought else (0.7, 0.1), SPLIT_SEED)
    return {**brought, **{s: [rows[i] for i in at] for s, at in zip(names, parts, strict=True)}}


# Answers.


def _read_problems(said: str | None, columns: Sequence[str]) -> dict[str, str]:
    """The kinds that are asked for by column: one for all, or `COLUMN=KIND` with commas."""
    if said is None:
        return {}
    parts = [part.strip() for part in said.split(",")]
    pairs = [part.rpartition("=")[::2] for part in parts]
    named = [c for c, _ in pairs]
    if len(pairs) > 1 and (not all(named) or len(set(named)) < len(named)):
        raise DataError(
            "kinds of problem are named for no column, or twice for one",
            where=f"--problem {said}",
            found=", ".join(c or kind for c, kind in pairs),
            fix="give one KIND for all, or COLUMN=KIND with commas, each column once",
        )
    told = {c: kind for c, kind in pairs if c} or dict.fromkeys(columns, said.strip())
    for column, kind in told.items():
        if column not in columns:
            raise DataError(
                "a problem is named for a column that is no answer",
                where=f"--problem {said}",
                found=column,
                fix=f"give COLUMN=KIND for one of {', '.join(columns)}",
            )
        known = (*_READERS, *_OF_PIXELS)
        if kind not in known:
            raise DataError(
                "no such problem for a column of a table",
                where=f"--problem {said}",
                found=kind,
                fix=f"give one of {', '.join(known)}",
            )
    return told


def _find_kind(
    table: Table, column: str, kind: str | None, rows: Sequence[int], several: bool
) -> tuple[str, str]:
    """The problem of a column, and what was assumed where nobody said it."""
    if kind is not None:
        return kind, ""
    if column in table.classes:
        several = any(isinstance(table.columns[column][n], list) for n in rows)
        return (MultiLabel if several else SingleLabel).kind, ""
    kind, why = table.kinds.get(column) or _guess(table, column, rows)
    option = f"{column}=KIND" if several else "KIND"
    return kind, f"{column}: {kind}, assumed of {why} (--problem {option} says otherwise)"


def _guess(table: Table, column: str, rows: Sequence[int]) -> tuple[str, str]:
    """The problem that cells look like, and why.

    Raises:
        DataError: They look like two of them.
    """
    cells = table.columns[column]
    if found := _guess_of_pixels([_as_value(cells[n]) for n in rows if not _is_missing(cells[n])]):
        return found
    lists = [np.asarray(cells[n]) for n in rows if np.ndim(cells[n])]
    if lists:
        return _guess_of_lists(lists, table, column)
    read = {n: _to_number(cells[n], table) for n in rows if not _is_missing(cells[n])}
    strange = [n for n, x in read.items() if x is None]
    if read and not strange:
        # Yes and no; more numbers are more than names of classes, unless somebody says that they are not.
        if set(read.values()) == {0.0, 1.0}:
            return SingleLabel.kind, "cells that are 0 or 1"
        return Regression.kind, "numbers"
    texts = [cells[n] for n in rows if isinstance(cells[n], str)]
    for separator in SEPARATORS:
        if any(separator in cell for cell in texts):
            return MultiLabel.kind, f"cells with {separator!r} in them"
    # NaN stands for an empty cell in a column of words.
    if sum(x is not None and math.isfinite(x) for x in read.values()) > len(strange):
        raise _wrong(
            "most cells of a column are numbers, and one is none",
            table,
            column,
            strange[0],
            f"correct it or remove the row, or say what they are: --problem {column}=KIND with "
            f"{SingleLabel.kind} for classes",
        )
    return SingleLabel.kind, "words"


def _guess_of_pixels(cells: Sequence[Any]) -> tuple[str, str] | None:
    """Of masks and depth maps, where all cells are such: pictures, or paths of them."""
    if not cells:
        return None
    if all(_is_path(each) for each in cells):
        ends = {Path(str(each).strip()).suffix.lower() for each in cells}
        if not ends <= image_suffixes() | {NUMPY}:
            return None
        return (
            (Depth.kind, "paths of arrays")
            if NUMPY in ends
            else (Segmentation.kind, "paths of pictures")
        )
    if all(isinstance(each, bytes | Image.Image) for each in cells):
        return Segmentation.kind, "pictures"
    if all(isinstance(each, np.ndarray | Tensor) and each.ndim == 2 for each in cells):
        floats = all(np.asarray(each).dtype.kind == "f" for each in cells)
        return (Depth.kind if floats else Segmentation.kind), "arrays `h w`"
    return None


def _guess_of_lists(lists: Sequence[np.ndarray], table: Table, column: str) -> tuple[str, str]:
    if _are_ones(lists):
        return MultiLabel.kind, "lists of 0 and 1"
    # An empty list is of no type.
    if all(each.size and each.dtype.kind in "iuf" for each in lists):
        if any(each.dtype.kind == "f" for each in lists):
            return Regression.kind, "lists of numbers"
        if lists[0].size > 1 and len({each.shape for each in lists}) == 1:
            raise DataError(
                "lists of whole numbers may be numbers or labels",
                where=f"{table.name}, column {column}",
                found=str(lists[0].tolist())[:80],
                fix=f"say which: --problem {column}={Regression.kind} or {MultiLabel.kind}",
            )
    return MultiLabel.kind, "lists"


def _are_ones(lists: Sequence[np.ndarray]) -> bool:
    """Whether they are rows of a table of zeros and ones, a column for each label."""
    return (
        bool(lists)
        and lists[0].ndim == 1
        and lists[0].size > 1
        and len({each.shape for each in lists}) == 1
        and all(each.dtype.kind in "biuf" and np.isin(each, (0, 1)).all() for each in lists)
    )


def _plain(cell: Any) -> Any:
    """A number of numpy or torch as Python's own; anything else as it is."""
    if isinstance(cell, np.generic | np.ndarray | Tensor) and cell.ndim == 0:
        return cell.item()
    return cell


def _is_missing(cell: Any) -> bool:
    """Whether there is nothing in it; NaN is a number to the column that it stands in."""
    cell = _plain(cell)
    # pandas' own, which are no floats: known by name, for pandas is hardly ever loaded here.
    if cell is None or type(cell).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(cell, str) and not cell.strip()


def _is_empty(cell: Any) -> bool:
    """As `_is_missing`, and NaN and infinity."""
    value = _plain(cell)
    return _is_missing(value) or (isinstance(value, float | Decimal) and not math.isfinite(value))


def _to_number(cell: Any, table: Table) -> float | None:
    """A cell as a number; None where it is none."""
    cell = _plain(cell)
    if isinstance(cell, numbers.Real | Decimal):
        try:
            return float(cell)
        except OverflowError:
            return math.inf
    if not isinstance(cell, str):
        return None
    text = cell.strip()
    if table.decimal and re.fullmatch(r"[-+]?\d+,\d+", text):
        # As Excel writes it where cells are separated by semicolons.
        text = text.replace(",", ".")
    if not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", text):
        return None
    return float(text)


_Read = tuple[dict[int, Any], list[str]]
"""Targets by row, and the names of what is answered."""


def _read_classes(table: Table, column: str, rows: Sequence[int]) -> _Read:
    cells = table.columns[column]
    words = []
    for n in rows:
        if _is_empty(cells[n]):
            raise _wrong(
                "a row of a table has no class", table, column, n, "give it one, or remove the row"
            )
        if np.ndim(cells[n]):
            raise _wrong(
                "a row of a table has several classes",
                table,
                column,
                n,
                "give --problem multi-label",
            )
        if not _is_word(cells[n]):
            raise _wrong(
                "a class is neither a word nor a number",
                table,
                column,
                n,
                "give words, or say another kind of answer with --problem",
            )
        words.append(_name(cells[n]))
    if (known := table.classes.get(column)) is not None:
        warn_of_look_alikes(known, f"{table.name}, column {column}")
        places = {y: i for i, y in enumerate(known)}
        return {n: places[word] for n, word in zip(rows, words, strict=True)}, known
    read = [_to_number(word, table) for word in words]
    if set(read) == {0.0, 1.0} and len(set(map(str.strip, words))) > 2:
        # Yes and no that are written in several ways: 1 and 1.0.
        words = [_name(x) for x in read]
    words = trim_labels(words, f"{table.name}, column {column}")
    # Short ones first, so that 2 stands before 10.
    labels = sorted(set(words), key=lambda y: (len(y), y))
    if len(labels) < 2:
        raise DataError(
            "a classification needs two classes",
            where=f"{table.name}, column {column}",
            found=f"{len(labels)}",
            fix="check the label column",
        )
    places = {y: i for i, y in enumerate(labels)}
    return {n: places[word] for n, word in zip(rows, words, strict=True)}, labels


def _read_tags(table: Table, column: str, rows: Sequence[int]) -> _Read:
    cells = table.columns[column]
    tags: dict[int, list[str]] = {}
    lists = [np.asarray(cells[n]) for n in rows if np.ndim(cells[n])]
    array = bool(lists) and isinstance(cells, np.ndarray | Tensor)
    width = lists[0].size if array or _are_ones(lists) else None
    known = column in table.classes
    for n in rows:
        cell = cells[n]
        if known and isinstance(cell, str):
            # A name of a class, whatever letters are in it.
            tags[n] = [cell]
        elif width is not None:
            ones = np.asarray(cell)
            if ones.shape != (width,) or not np.isin(ones, (0, 1)).all():
                raise _wrong(
                    f"a row of a table of labels is other than {width} of 0 and 1",
                    table,
                    column,
                    n,
                    f"correct it, or give --problem {Regression.kind} for numbers",
                )
            tags[n] = [str(k) for k in ones.nonzero()[0].tolist()]
        elif np.ndim(cell):
            if np.ndim(cell) > 1 or not all(map(_is_tag, cell)):
                raise _wrong(
                    "a list of labels holds what is no label",
                    table,
                    column,
                    n,
                    "give words or whole numbers in each",
                )
            tags[n] = [_name(each) if known else _name(each).strip() for each in cell]
        elif cell is None or isinstance(cell, str):
            separators = "[" + re.escape(SEPARATORS) + "]"
            tags[n] = [t.strip() for t in re.split(separators, cell or "") if t.strip()]
        elif _is_empty(cell):
            raise _wrong(
                "a cell of labels is no label", table, column, n, "leave it empty, or give a list"
            )
        elif not _is_tag(cell):
            raise _wrong(
                "a cell of labels is no label", table, column, n, "give words, or a list of them"
            )
        else:
            tags[n] = [_name(cell)]
    labels = table.classes.get(column) or sorted(
        {t for each in tags.values() for t in each}, key=lambda y: (len(y), y)
    )
    if not any(tags.values()):
        raise DataError(
            "a column of labels holds none",
            where=f"{table.name}, column {column}",
            found="empty cells",
            fix=f"write labels with {' or '.join(SEPARATORS)} between them",
        )
    trim_labels(labels, f"{table.name}, column {column}")
    if width is not None:
        labels = [str(k) for k in range(width)]
    places = {y: i for i, y in enumerate(labels)}
    targets = {}
    for n in rows:
        targets[n] = torch.zeros(len(labels))
        targets[n][[places[t] for t in tags[n]]] = 1.0
    return targets, labels


def _read_numbers(table: Table, column: str, rows: Sequence[int]) -> _Read:
    cells, read = table.columns[column], {}
    width = None
    for n in rows:
        cell = cells[n]
        several = list(cell) if np.ndim(cell) else [cell]
        if any(map(_is_missing, several)) or not several:
            raise _wrong(
                "a row of a table has no number", table, column, n, "give it one, or remove the row"
            )
        values = [_to_number(each, table) for each in several]
        if any(x is None for x in values):
            raise _wrong(
                "a number of a table is none",
                table,
                column,
                n,
                "write a number such as 3.5, or give --problem single-label for words",
            )
        if not all(math.isfinite(x) for x in values if x is not None):
            raise _wrong(
                "a number of a table is not finite", table, column, n, "give it, or remove the row"
            )
        width = len(values) if width is None else width
        if len(values) != width:
            raise _wrong(
                f"a row of a table has other than {width} numbers",
                table,
                column,
                n,
                "give as many in each",
            )
        read[n] = values
    _check_rounding(table, column, read)
    targets = {n: torch.tensor(values, dtype=torch.float32) for n, values in read.items()}
    names = [column] if width == 1 else [f"{column} {k}" for k in range(width or 0)]
    return targets, names


def _check_rounding(table: Table, column: str, read: Mapping[int, Sequence[float | None]]) -> None:
    """Refuse numbers that float32 does not hold, or not apart from each other."""
    values = torch.tensor(list(read.values()), dtype=torch.float64)
    kept = values.float().double()
    lost = "subtract an offset or change the unit (seconds as days, for instance)"
    beyond = ~kept.isfinite().all(1)
    if bool(beyond.any()):
        row = list(read)[int(beyond.nonzero()[0, 0])]
        raise _wrong("a number of a table is beyond float32", table, column, row, lost)
    off, deviation = (kept - values).abs().amax(0), values.std(0, correction=0)
    # What never changes is not learned, however it is rounded.
    changes = deviation > 1e-12 * values.abs().amax(0)
    if bool((changes & (off > ROUNDING * deviation)).any()):
        raise DataError(
            "numbers of a table lie too close together for float32",
            where=f"{table.name}, column {column}",
            found=f"up to {values.abs().max():g}, deviation {deviation.max():g}, "
            f"rounded by up to {off.max():g}",
            fix=lost,
        )


def _is_tag(each: Any) -> bool:
    value = _plain(each)
    whole = not (isinstance(value, float) and not value.is_integer())
    return not _is_empty(value) and whole and _is_word(value)


def _is_word(cell: Any) -> bool:
    """Whether it may be the name of a class: not what holds other cells, no bytes, no date."""
    return isinstance(_plain(cell), str | numbers.Number)


def _name(cell: Any) -> str:
    """A class as a word: 2.0 of a spreadsheet is 2."""
    value = _plain(cell)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _wrong(what: str, table: Table, column: str, row: int, fix: str) -> DataError:
    cell = table.columns[column][row]
    return DataError(
        what, where=f"{table.shown(row)}, column {column}", found=repr(cell)[:80], fix=fix
    )


_READERS: dict[str, Callable[[Table, str, Sequence[int]], _Read]] = {
    SingleLabel.kind: _read_classes,
    MultiLabel.kind: _read_tags,
    Regression.kind: _read_numbers,
}
_OF_PIXELS = (Segmentation.kind, Depth.kind)
