"""Data sets by name or path."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from restuning._errors import DataError, UnknownNameError
from restuning._files import expand_home
from restuning.data.arrays import find_torchvision, from_sklearn, from_torchvision
from restuning.data.data import Data, DataOptions, name_of
from restuning.data.folders import from_folder
from restuning.data.hub_sets import from_tables, is_table, load_tables
from restuning.data.texts import TABLES, TAGGED, find_files, from_conll, from_csv

if TYPE_CHECKING:
    from restuning.backbones import Backbone


def load_data(
    name: Any, backbone: Backbone, options: DataOptions | None = None, **keywords: Any
) -> Data:
    """Load a data set with the backbone's own preprocessing.

    Args:
        name: `digits`; a folder of class folders (with or without train/val/test); a folder in
            VTAB-1K list layout; `torchvision:NAME`; `hf:NAME`, where the name is that of a hub, of a folder
            or of a parquet file; a `datasets.Dataset` or `DatasetDict`; a csv file or folder of csv files
            (a text and a label a row); a CoNLL file or folder of them (a word and a tag a line).
        backbone: Whose preprocessing or tokenizer is used.
        options: How it is read; None for the defaults of `DataOptions`.
        keywords: Fields of `DataOptions` that differ: `augment` ("none", "flip", "timm",
            "timm:POLICY"), `skip_bad`, `final` (train on train and val), `text` and `label` (columns
            of a csv), `max_tokens`, `root` (of torchvision data sets).

    Raises:
        DataError: Missing or malformed data.
        UnknownNameError: No such data set.
    """
    options = replace(options or DataOptions(), **keywords)
    if is_table(name):
        if backbone.preprocessing is None:
            raise _wants_text("a Hugging Face data set")
        return from_tables(name, _name_of(name), backbone.preprocessing, options)
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
        return from_csv(path, files, backbone, options)
    if files := find_files(path, TAGGED):
        return from_conll(path, files, backbone, options)
    if backbone.preprocessing is None:
        raise _wants_text(name)
    if name == "digits":
        return from_sklearn(backbone.preprocessing, options)
    if scheme == "torchvision" and rest:
        return from_torchvision(rest, backbone.preprocessing, options)
    if scheme == "hf" and rest:
        return from_tables(load_tables(rest), _shorten(rest), backbone.preprocessing, options)
    if path.is_dir():
        return from_folder(path, backbone.preprocessing, options)
    raise UnknownNameError(
        "no such data set",
        where=name,
        fix="give `digits`, a folder, a csv file, torchvision:NAME or hf:NAME",
    )


def may_be_data(name: str) -> bool:
    """Whether `load_data` would look for a data set of that name: it is known, or something is there.

    Raises:
        UnknownNameError: It is one of torchvision's, which has none of that name.
    """
    scheme, _, rest = name.partition(":")
    if scheme == "torchvision" and rest:
        return bool(find_torchvision(rest))
    return name == "digits" or (scheme == "hf" and bool(rest)) or expand_home(name).exists()


def _shorten(name: str) -> str:
    """`set` of `user/set`, of a folder or of `set.parquet`."""
    path = expand_home(name)
    return name_of(path) if path.exists() else path.name


def _wants_text(where: str) -> DataError:
    return DataError(
        "a text backbone needs text", where=where, fix="give a csv file, or an image backbone"
    )


def _name_of(sets: Any) -> str:
    """What tables call themselves."""
    first = next(iter(sets.values())) if isinstance(sets, dict) else sets
    info = getattr(first, "info", None)
    return getattr(info, "dataset_name", None) or getattr(info, "builder_name", None) or "dataset"
