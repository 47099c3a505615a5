"""Inputs whose labels nobody asks for, with an id each: what is embedded and searched."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from restuning._errors import DataError
from restuning._files import expand_home
from restuning.data.data import Data, DataOptions, name_of
from restuning.data.folders import LISTS
from restuning.data.identity import list_files, list_ids
from restuning.data.listing import CORRUPT, say_left_out
from restuning.data.load import load_data
from restuning.data.media import (
    describe_inputs,
    drop_corrupt,
    media_of,
    open_files,
    say_cut,
    with_preprocessing,
)
from restuning.data.shards import find_shards
from restuning.data.tables import find_table, has_class_folders, load_columns
from restuning.data.text_files import read_csv, read_numbered_lines
from restuning.data.texts import TABLES, require_tokenizer
from restuning.data.tokens import TextBatch

if TYPE_CHECKING:
    from restuning.backbones import Backbone
    from restuning.backbones.inputs import AnyPreprocessing

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Collection:
    """A data set's inputs in order, split by split where it has splits.

    Attributes:
        data: The data set; one without labels is all training split.
        ids: One an input: the path of a file relative to the folder, `SHARD/KEY` in tars, `FILE#ROW` of images in parquet files, else the number of a row in its table or of a line
            in its file (from 1; empty lines count), else `SPLIT/ROW` (from 0).
        texts: The inputs themselves, where they are texts of a file.
    """

    data: Data
    ids: list[str]
    texts: Sequence[str] | None = None

    @property
    def splits(self) -> list[str]:
        """Names of those that are there."""
        return [name for name in SPLITS if getattr(self.data, name) is not None]


def load_collection(
    name: Any, backbone: Backbone, options: DataOptions | None = None
) -> Collection:
    """All inputs of a folder, a file or a data set, with ids.

    A folder of images that is a data set as `load_data` reads it, with every image in a class, is read as that one, so that
    features that were stored for training are found; any other is all the images in it, at any depth. A file of
    texts is read as its rows.

    Args:
        name: A folder of images or one image; a csv, tsv or txt file of texts; else as `load_data` takes it.
        backbone: Whose preprocessing or tokenizer is used.
        options: How it is read.

    Raises:
        DataError: Missing, malformed or empty.
        UnknownNameError: No such data set.
    """
    options = options or DataOptions()
    backbone = with_preprocessing(backbone, options)
    if isinstance(name, Data):
        return _of_data(name, None)
    if find_shards(name):
        return _of_data(load_data(name, backbone, options), None)
    if not isinstance(name, str | Path):
        return _of_data(next(iter(load_columns(name, backbone, options).values())), None)
    path = expand_home(name)
    if path.is_file() and backbone.tokenizer is not None and not _asks_for_table(options):
        return _of_texts(path, backbone, options)
    if find_table(name, backbone, options):
        # Whatever the columns of answers are: the inputs are the same.
        data = next(iter(load_columns(name, backbone, options).values()))
        return _of_data(data, path if path.is_dir() else path.parent)
    if backbone.preprocessing is None or not path.exists():
        return _of_data(load_data(name, backbone, options), None)
    if (path / LISTS["train"]).exists():
        return _of_data(load_data(name, backbone, options), path)
    return _of_files(path, backbone.preprocessing, backbone, options)


def _asks_for_table(options: DataOptions) -> bool:
    return any(each is not None for each in (options.image, options.audio, options.problem))


def _of_data(data: Data, folder: Path | None) -> Collection:
    """A data set of splits; ids are paths in a folder where its inputs are files."""
    ids: list[str] = []
    for split in SPLITS:
        rows = getattr(data, split)
        if rows is None:
            continue
        files = None if folder is None else list_files(rows)
        if files and folder is not None:
            ids += [relative(file, folder) for file in files]
        elif (named := list_ids(rows)) is not None:
            ids += named
        else:
            ids += [f"{split}/{row}" for row in range(len(rows))]
    return Collection(data, ids)


def relative(file: Path, folder: Path) -> str:
    """The path of a file in a folder; its own where it lies elsewhere."""
    return (file.relative_to(folder) if file.is_relative_to(folder) else file).as_posix()


def _of_files(
    path: Path, preprocessing: AnyPreprocessing, backbone: Backbone, options: DataOptions
) -> Collection:
    media = media_of(preprocessing)
    files, left_out = ([path], {}) if path.is_file() else media.find(path)
    if not files:
        raise DataError(
            f"a folder without {media.nouns}",
            where=str(path),
            found=say_left_out(left_out),
            fix=f"put {media.nouns} there ({media.usual})",
        )
    if has_class_folders(path, backbone):
        # Albums may look like classes and be none: then they are all files of a folder.
        with suppress(DataError):
            data = load_data(path, backbone, options)
            own = _of_data(data, path)
            bad = {str(each) for each in data.left_out.get(CORRUPT, [])}
            if {*own.ids, *bad} == {relative(file, path) for file in files}:
                return own
    if options.skip_bad:
        good, bad = drop_corrupt([(file, 0) for file in files], preprocessing)
        files, left_out[CORRUPT] = [file for file, _ in good], bad
        if not files:
            raise DataError(
                f"none of the {media.nouns} can be read",
                where=str(path),
                found=say_left_out(left_out),
            )
    folder = path.parent if path.is_file() else path
    ids = [relative(file, folder) for file in files]
    rows = open_files([(file, 0) for file in files], preprocessing)
    told = {why: [relative(p, folder) for p in paths] for why, paths in left_out.items()}
    how = describe_inputs(preprocessing)
    data = Data(name_of(path), rows, None, None, [], left_out=told, **how)
    say_cut(data)
    return Collection(data, ids)


def _of_texts(path: Path, backbone: Backbone, options: DataOptions) -> Collection:
    collate = TextBatch(require_tokenizer(path, backbone), options.max_tokens)
    if path.suffix.lower() in TABLES:
        texts = [text for text, _ in read_csv(path, options.text, None)]
        numbers = list(range(1, len(texts) + 1))
    else:
        lines = read_numbered_lines(path)
        numbers, texts = [number for number, _ in lines], [line for _, line in lines]
    if not texts:
        raise DataError("a file without texts", where=str(path), fix="fill it, or name another")
    data = Data(
        name_of(path),
        [(text, 0) for text in texts],
        None,
        None,
        [],
        collate.kind,
        collate,
        notes={"preprocessing": collate.to_dict()},
    )
    return Collection(data, [str(number) for number in numbers], texts)
