"""Data sets by name or path."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from restuning._errors import DataError, UnknownNameError
from restuning._files import expand_home
from restuning.backbones.audio_preprocessing import AudioPreprocessing
from restuning.backbones.preprocessing import Preprocessing
from restuning.data.arrays import find_torchvision, from_torchvision, read_digits
from restuning.data.data import Data, DataOptions
from restuning.data.depths import Depths, from_depths
from restuning.data.embedded import as_embedding
from restuning.data.folders import from_folder
from restuning.data.hub_sets import is_hub_set
from restuning.data.masks import Masks, from_masks, no_masks
from restuning.data.media import describe_inputs, make_whole, media_of, say_cut, with_preprocessing
from restuning.data.parquet import find_parquets
from restuning.data.pixels import has_targets
from restuning.data.shards import find_shards
from restuning.data.tables import find_table, has_class_folders, load_columns
from restuning.data.tars import from_tars
from restuning.data.texts import TABLES, TAGGED, find_files, from_conll, from_csv
from restuning.problems import Embedding

if TYPE_CHECKING:
    from restuning.backbones import Backbone


OF_PIXELS = {each.kind: (each, read) for each, read in ((Masks, from_masks), (Depths, from_depths))}
"""Targets of pixels that lie beside images, by problem."""


def load_data(
    name: Any, backbone: Backbone, options: DataOptions | None = None, **keywords: Any
) -> Data:
    """Load a data set with the backbone's own preprocessing.

    Args:
        name: `digits`; a folder of class folders of images or sounds (with or without train/val/test); a folder in
            VTAB-1K list layout; tars as webdataset writes them (`data/shards.py`: one, a pattern, a folder, a list); a folder of `images/` and `masks/` or `depth/`; `torchvision:NAME`; `hf:NAME`, where the name is that of a hub, of a folder,
            of a parquet file or of a kind of files, and arguments of `load_dataset` may follow (`data/hub_sets.py`); a `datasets.Dataset` or `DatasetDict`; a csv file or folder of csv files
            (a text and a label a row); a table (`data/tables.py`): a csv or parquet file or a folder of them (parquet files
            also by a pattern or URL, as tars, and with images in their rows) with a column of images, sounds or texts and one of answers of any kind, a pandas frame, a mapping of columns, or a list of
            dictionaries; a CoNLL file or folder of them (a word and a tag a line).
        backbone: Whose preprocessing or tokenizer is used.
        options: How it is read; None for the defaults of `DataOptions`.
        keywords: Fields of `DataOptions` that differ: `augment` ("none", "flip", "timm",
            "timm:POLICY"), `skip_bad`, `final` (train on train and val), `text`, `image`, `audio` and `label` (columns
            of a csv or a table), `problem` (the kind of answer in a column, or "embedding") and `dimensions`, `classes` (of masks), `whole` (crop nothing), `scaled_jpeg` (decode large JPEG files scaled), `max_tokens`, `seconds` (of sounds), `root` (of torchvision data sets).

    Raises:
        DataError: Missing or malformed data.
        UnknownNameError: No such data set.
    """
    options = replace(options or DataOptions(), **keywords)
    if options.whole and backbone.preprocessing is not None:
        whole = make_whole(backbone.preprocessing, str(name)[:80])
        plain = replace(options, whole=False)
        data = load_data(name, replace(backbone, preprocessing=whole), plain)
        data.notes = {"preprocessing": whole.to_dict(), **data.notes}
        return data
    if options.problem == Embedding.kind:
        plain = replace(options, problem=None, dimensions=None)
        return as_embedding(load_data(name, backbone, plain), options.dimensions)
    if options.dimensions is not None:
        raise DataError(
            "only an embedding has dimensions",
            where=f"dimensions={options.dimensions}",
            found=f"problem {options.problem or 'found from the data'}",
            fix=f"give --problem {Embedding.kind} as well, or leave it out",
        )
    backbone = with_preprocessing(backbone, options)
    data = _load(name, backbone, options)
    data.notes = {**describe_inputs(backbone.preprocessing).get("notes", {}), **data.notes}
    say_cut(data)
    return data


def _load(name: Any, backbone: Backbone, options: DataOptions) -> Data:
    if shards := find_shards(name):
        _refuse_columns("tars", options)
        return from_tars(shards, _require_images(backbone, "tars"), options)
    if find_table(name, backbone, options):
        columns = load_columns(name, backbone, options)
        if len(columns) > 1:
            raise DataError(
                "several columns of answers are several data sets",
                where="label",
                found=", ".join(columns),
                fix="give one; restuning.train trains a task for each, load_columns loads them",
            )
        return next(iter(columns.values()))
    if str(name).strip() and (found := _find_of_pixels(str(name), options)):
        classes = None if found == Masks.kind else options.classes
        _refuse_columns(str(name), replace(options, problem=None, classes=classes))
        return _load_pixels(str(name), found, backbone, options)
    _refuse_columns(str(name), options)
    name = str(name)
    if not name.strip():
        # As a path it would be the folder that one stands in: a variable of a shell was not set.
        raise UnknownNameError(
            "no data set is named", found=repr(name), fix="give `.` for this folder"
        )
    path = expand_home(name)
    # Files and folders say what they are; only then is a name read as a name.
    scheme, _, rest = name.partition(":")
    if files := find_files(path, TABLES):
        if backbone.preprocessing is not None and has_class_folders(path, backbone):
            raise DataError(
                "a folder holds a table and class folders of files",
                where=str(path),
                found=", ".join(file.name for file in files.values()),
                fix=f"name the table's column with {media_of(backbone.preprocessing).option}, or move the table "
                "elsewhere",
            )
        return from_csv(path, files, backbone, options)
    if files := find_files(path, TAGGED):
        return from_conll(path, files, backbone, options)
    if backbone.preprocessing is None:
        raise _wants_text(name)
    if name == "digits":
        return read_digits(_require_images(backbone, name), options)
    if scheme == "torchvision" and rest:
        return from_torchvision(rest, _require_images(backbone, name), options)
    if path.is_dir():
        return from_folder(path, backbone.preprocessing, options)
    raise UnknownNameError(
        "no such data set",
        where=name,
        fix="give `digits`, a folder, a csv or parquet file, tars, torchvision:NAME or hf:NAME",
    )


def is_gone(name: str) -> bool:
    """Whether a name is that of a file or a folder, and none is there."""
    there = is_by_name(name) or os.path.exists(expand_home(name)) or _are_shards(name)
    return not there


def is_by_name(name: str) -> bool:
    """Whether data are known by a name, and lie in no folder that is told."""
    scheme, _, rest = name.partition(":")
    named = name == "digits" or (scheme == "torchvision" and bool(rest)) or is_hub_set(name)
    return named or "://" in name


def _are_shards(name: str) -> bool:
    """Whether a name stands for tars or parquet files of which the first is there."""
    try:
        shards = find_shards(name) or find_parquets(name)
    except DataError:
        return False
    return shards is not None and os.path.exists(next(iter(shards.names)).name)


def _find_of_pixels(name: str, options: DataOptions) -> str | None:
    """The problem of pixels that a folder is of, or that is asked for; None where there is none."""
    if options.problem in OF_PIXELS:
        return options.problem
    path = expand_home(name)
    there = [kind for kind, (each, _) in OF_PIXELS.items() if has_targets(path, each.folder)]
    if len(there) > 1:
        folders = " and ".join(f"{OF_PIXELS[kind][0].folder}/" for kind in there)
        raise DataError(
            "a folder has several kinds of targets of pixels",
            where=name,
            found=folders,
            fix=f"say which is asked for: --problem {' or '.join(there)}",
        )
    return there[0] if there else None


def _load_pixels(name: str, kind: str, backbone: Backbone, options: DataOptions) -> Data:
    targets, read = OF_PIXELS[kind]
    images = _require_images(backbone, name)
    if options.problem not in (None, kind):
        raise DataError(
            f"a folder of images and {targets.noun}s asks for {targets.asks}",
            where=name,
            found=f"problem {options.problem}",
            fix=f"leave it out, or give {kind}",
        )
    return read(expand_home(name), images, options)


def _refuse_columns(name: str, options: DataOptions) -> None:
    """Refuse what only a table has (kinds of answers, a column of images or sounds, a list of those of answers) or only masks."""
    if options.classes is not None:
        raise no_masks(name, options)
    several = None if isinstance(options.label, str) else options.label
    asked = {
        "problem": options.problem,
        "image": options.image,
        "audio": options.audio,
        "label": several,
    }
    for option, value in asked.items():
        if value is not None:
            raise DataError(
                "only a table says its columns",
                where=option,
                found=f"{value} of {name}",
                fix="give a csv or parquet file, hf:NAME, a frame or columns; of a folder or a set leave it out",
            )


def may_be_data(name: str) -> bool:
    """Whether `load_data` would look for a data set of that name: it is known, or something is there.

    Raises:
        UnknownNameError: It is one of torchvision's, which has none of that name.
    """
    scheme, _, rest = name.partition(":")
    if scheme == "torchvision" and rest:
        return bool(find_torchvision(rest))
    return name == "digits" or is_hub_set(name) or expand_home(name).exists() or _are_shards(name)


def _require_images(backbone: Backbone, where: str) -> Preprocessing:
    """How images are prepared, of data that are images whatever the backbone takes."""
    if backbone.preprocessing is None:
        raise _wants_text(where)
    if isinstance(backbone.preprocessing, AudioPreprocessing):
        raise DataError(
            "a backbone of sounds needs sounds",
            where=where,
            found=f"backbone {backbone.name}",
            fix="give a folder with a folder of sounds for each class, or a table with --audio COLUMN",
        )
    return backbone.preprocessing


def _wants_text(where: str) -> DataError:
    return DataError(
        "a text backbone needs text", where=where, fix="give a csv file, or an image backbone"
    )
