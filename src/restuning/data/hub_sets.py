"""Hugging Face data sets: by name, from a folder or file, or as the objects themselves; their columns as a table has them."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from PIL import Image
from torch import Tensor

from restuning._errors import DataError, require
from restuning._files import expand_home, file_state, lies_inside
from restuning.backbones.images import Least, Measured, measure, read_image
from restuning.data.data import ImageDataset, name_of
from restuning.data.digests import Tell, digest_value, quiet
from restuning.data.identity import (
    Samples,
    as_stored,
    describe_reading,
    file_inputs,
    label_digests,
)
from restuning.data.remote import is_url
from restuning.data.splits import find_splits
from restuning.data.stored_images import StoredImages

SCHEME = "hf:"

ROWS = 50
"""Of a column of images that are read together."""

CELLS = 1000
"""Of any other column."""

ARRAYS = ("Array2D", "Array3D")
"""Types of columns of arrays that may be pictures."""

ARGUMENTS = ("name", "data_dir", "data_files", "split", "revision")
"""Of `load_dataset`, which may stand behind a name. None of them runs code."""

BUILDERS = ("imagefolder", "audiofolder", "webdataset", "parquet", "arrow", "csv", "json", "text")
"""Kinds of files that are read without a repository. `pandas`, which reads pickles and so runs code, is none of them."""


@dataclass(frozen=True)
class HubSet:
    """The splits of a data set that are used, training first, and what their columns are.

    Attributes:
        name: What it is called.
        parts: `datasets.Dataset` by "train", "val" and "test".
        names: Of the columns of the training split.
        pictures, sounds: Columns that hold images or sounds by their type, whatever they are called.
        classes: Names of classes, by column, of a `ClassLabel` or of lists of them.
        numbered: Columns of whole numbers that no `ClassLabel` names.
        texts: Columns of texts, which as inputs of images are paths.
        fetched: Whether it came from a hub: a stranger then wrote what stands in it, and it names no file of this machine but
            what was fetched with it.
    """

    name: str
    parts: Mapping[str, Any]
    names: list[str]
    pictures: list[str]
    sounds: list[str]
    classes: Mapping[str, list[str]]
    numbered: list[str]
    texts: list[str]
    fetched: bool = False

    @property
    def firsts(self) -> list[int]:
        """The first row of each split, where all stand one after the other."""
        return [0, *np.cumsum([len(part) for part in self.parts.values()]).tolist()]

    def splits(self) -> dict[str, range]:
        """Rows by split; a training split that has to give the test rows as well is the "whole"."""
        firsts = self.firsts
        rows = {s: range(*firsts[n : n + 2]) for n, s in enumerate(self.parts)}
        return rows if "test" in rows else {"whole": rows.pop("train"), **rows}

    @property
    def shown(self) -> Callable[[int], str]:
        """What an error calls a row."""
        # Without the data themselves: a loader's process gets this with one column.
        return partial(_show, self.name, list(self.parts), self.firsts)

    def require_columns(self, columns: Sequence[str]) -> None:
        """Refuse splits of other columns or classes than the training split.

        Raises:
            DataError: One lacks a column, or names its classes otherwise.
        """
        for split, part in self.parts.items():
            where = f"{self.name}, split {split}"
            missing = [c for c in columns if c not in part.features]
            if missing:
                raise DataError(
                    "a split lacks a column",
                    where=where,
                    found=", ".join(part.features),
                    fix=f"give it {', '.join(missing)}, as training has them",
                )
            for column in columns:
                theirs, known = _names_of(part.features[column]), self.classes.get(column)
                if theirs != known:
                    raise DataError(
                        "splits have other classes than the training split",
                        where=f"{where}, column {column}",
                        found=f"{str(theirs)[:80]}, training {str(known)[:80]}",
                        fix="give all splits the same ClassLabel",
                    )

    def read(self, column: str) -> list[Any]:
        """The cells of a column of all splits; of images and sounds their bytes or their files, nothing decoded."""
        cells: list[Any] = []
        for part in self.parts.values():
            kind = part.features[column]
            make = _cell_maker(kind)
            rows = part.select_columns([column]).with_format("arrow")
            for batch in rows.iter(CELLS):
                cells += map(make, batch.column(column).to_pylist())
        return cells

    def images(self, column: str) -> HubCells:
        """A column of images of all splits, which are read when asked for.

        Raises:
            DataError: It holds no images, or splits hold them in other types.
        """
        hf = _require(self.name)
        kept = [_keep_encoded(hf, part, column, self.name) for part in self.parts.values()]
        try:
            homes = _caches(hf) if self.fetched else None
            return HubCells(hf.concatenate_datasets(kept), column, self.shown, homes)
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                "splits have other columns than the training split",
                where=self.name,
                found=str(error).splitlines()[0][:200],
                fix="cast them to the same features",
            ) from None


def _show(name: str, splits: Sequence[str], firsts: Sequence[int], row: int) -> str:
    number = bisect.bisect_right(firsts, row) - 1
    split = f", split {splits[number]}" if len(splits) > 1 else ""
    return f"{name}{split}, row {row - firsts[number]}"


_looked_through: dict[Any, list[bytes | Path]] = {}
"""What was found of columns of images in this process: a command loads its data for each column of answers."""


class HubCells(StoredImages):
    """A column of images of a Hugging Face table, encoded where that has them so.

    Args:
        table: All rows of all splits, with this column alone, which it does not decode.
        column: Of the images.
        shown: What an error calls a row.
        homes: Folders in which files that it names lie, links followed; None for any.
    """

    def __init__(
        self,
        table: Any,
        column: str,
        shown: Callable[[int], str],
        homes: Sequence[Path] | None = None,
    ) -> None:
        self.table, self.column, self.shown, self.homes = table, column, shown, homes
        self._known: list[bytes | Path] | None = None
        self.missing = set()
        start = 0
        for batch in table.with_format("arrow").iter(CELLS):
            # Tells without reading them.
            nothing = batch.column(column).is_null().to_pylist()
            self.missing |= {start + n for n, null in enumerate(nothing) if null}
            start += len(nothing)

    def __len__(self) -> int:
        """Rows of all splits."""
        return len(self.table)

    def __getitem__(self, row: Any) -> Any:
        """The bytes of an image, its file, or its numbers.

        Raises:
            DataError: There is none.
        """
        cell = as_stored(self.table[row][self.column])
        if cell is None or cell == Path():
            raise self.is_missing(row)
        self._require_inside(row, cell)
        if isinstance(cell, list):
            # As lists, numbers no longer say how many bits they have; columns of arrays do.
            return np.asarray(cell, getattr(self.table.features[self.column], "dtype", None))
        return cell

    def _require_inside(self, row: int, cell: Any) -> None:
        if self.homes is None or not isinstance(cell, Path) or lies_inside(cell, *self.homes):
            return
        raise DataError(
            "a data set of a hub names a file of this machine",
            where=self.show(row),
            found=str(cell)[:200],
            fix="load it yourself and give the object, if that file is meant",
        )

    def id(self, row: int) -> str:
        """As an error calls it."""
        return self.shown(row)

    def show(self, row: int) -> str:
        """The data set, the split and the row in it, from 0."""
        return f"{self.shown(row)}, column {self.column}"

    def is_missing(self, row: int) -> DataError:
        """The error of a row without an image."""
        return DataError(
            "an image is missing",
            where=self.show(row),
            found="nothing where its bytes or its path should be",
            fix="leave such rows out with --skip-bad",
        )

    def open(
        self,
        rows: Sequence[int],
        labels: Sequence[Any],
        transform: Callable[[Image.Image], Tensor],
        keep: bool = False,
    ) -> HubImages:
        """Some rows with an answer each."""
        return HubImages(self, rows, labels, transform, keep)

    def look_through(self) -> list[bytes | Path]:
        """Of each image the digest of its bytes, or its file; read once for all columns and splits, for a table does not change.

        Cost: a pass over the images, about a second a gigabyte, once a process for each file of a table.
        """
        if self._known is None:
            key = self._key()
            self._known = _looked_through.get(key) or self._digest()
            if key is not None:
                _looked_through[key] = self._known
        return self._known

    def _digest(self) -> list[bytes | Path]:
        found: list[bytes | Path] = []
        for row, cell in enumerate(map(as_stored, self._cells())):
            if cell != Path():
                self._require_inside(row, cell)
            found.append(cell if isinstance(cell, Path) else digest_value(cell))
        return found

    def _key(self) -> Any:
        """Of the table in its files; None of one in memory, or where files have just been written."""
        try:
            states = [file_state(Path(each["filename"])) for each in self.table.cache_files]
        except OSError:
            return None
        if not states or None in states:
            return None
        return self.table._fingerprint, self.column, tuple(states)

    def _cells(self) -> Iterator[Any]:
        for start in range(0, len(self.table), ROWS):
            yield from self.table[start : start + ROWS][self.column]


class HubImages(ImageDataset):
    """Images of a Hugging Face table with an answer each, read from it and decoded when asked for.

    Args:
        cells: All rows.
        rows: Which of them, in order.
        labels: One for each of `rows`.
        transform: Image to tensor.
        keep: Keep transformed tensors in memory (only where the transform has no randomness).
    """

    def __init__(
        self,
        cells: HubCells,
        rows: Sequence[int],
        labels: Sequence[Any],
        transform: Callable[[Image.Image], Tensor],
        keep: bool = False,
    ) -> None:
        super().__init__(transform, keep)
        self.cells, self.rows, self.labels = cells, list(rows), list(labels)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.rows)

    def image(self, index: int, least: Least | None = None) -> Image.Image:
        """Decoded.

        Raises:
            DataError: There is none in its row, or it cannot be read.
        """
        row = self.rows[index]
        return read_image(self.cells[row], self.cells.show(row), least)

    def measure(self, index: int) -> Measured:
        """By its header, where it has one."""
        row = self.rows[index]
        return measure(self.cells[row], self.cells.show(row))

    def label(self, index: int) -> Any:
        """As it was given."""
        return self.labels[index]

    @property
    def files(self) -> list[Path]:
        """One an image, where the table holds paths; empty where it holds images."""
        return [each for each in self._stored() if isinstance(each, Path)]

    def sample_digests(self, tell: Tell = quiet) -> Samples:
        """Those of what the table holds of each image: its bytes, or its file's as they are now."""
        of_files = iter(file_inputs(self.files, tell))
        inputs = [next(of_files) if isinstance(each, Path) else each for each in self._stored()]
        self.forget_changed(inputs)
        return Samples(inputs, label_digests(self.labels), describe_reading(self.transform))

    def _stored(self) -> list[bytes | Path]:
        known = self.cells.look_through()
        return [known[row] for row in self.rows]


# Which data set.


def is_hub_set(name: Any) -> bool:
    """Whether it is a `datasets.Dataset` or `DatasetDict`, or `hf:NAME`; a URL (`hf://...`) is none."""
    if isinstance(name, str | Path):
        return _named(str(name)) is not None
    first = next(iter(name.values()), None) if isinstance(name, dict) else name
    return any(c.__module__.partition(".")[0] == "datasets" for c in type(first).__mro__)


def _named(name: str) -> str | None:
    """What stands behind `hf:`; None of another name."""
    rest = name.removeprefix(SCHEME)
    return rest if rest and rest != name and not is_url(name) else None


def name_on_hub(name: str) -> str | None:
    """`hf:NAME` without arguments; None of what is read by the kind of its files."""
    rest = (_named(name) or "").partition("?")[0]
    return f"{SCHEME}{rest}" if rest and rest not in BUILDERS else None


def open_hub_set(name: Any) -> HubSet:
    """A data set by `hf:NAME`, or a `Dataset` or `DatasetDict`.

    Raises:
        DataError: There is none, it cannot be read, is streamed, or has no training split.
    """
    if isinstance(name, str | Path):
        called, sets = name_hub_set(str(name)), _load(_named(str(name)) or "")
    else:
        called, sets = _name_of(name), name
    parts = _find_parts(sets, called)
    features = parts["train"].features
    kinds = {column: type(kind).__name__ for column, kind in features.items()}
    types = {column: str(getattr(kind, "dtype", "")) for column, kind in features.items()}
    held = [c for c, kind in features.items() if _is_stored(kind) or "binary" in types[c]]
    arrays = [c for c, kind in kinds.items() if kind in ARRAYS]
    return HubSet(
        called,
        parts,
        list(features),
        [c for c, kind in kinds.items() if kind == "Image" or c in held] or arrays,
        [c for c, kind in kinds.items() if kind == "Audio" or c in held],
        {c: names for c, kind in features.items() if (names := _names_of(kind)) is not None},
        [c for c, kind in kinds.items() if kind == "Value" and "int" in types[c]],
        [c for c, each in types.items() if "string" in each],
        fetched=isinstance(name, str | Path) and _is_fetched(_named(str(name)) or ""),
    )


def _is_fetched(name: str) -> bool:
    """Whether a name is that of a repository: no folder, file or kind of files here."""
    plain = name.partition("?")[0]
    here = (expand_home(each).exists() for each in (name, plain))
    return plain not in BUILDERS and not any(here)


def _caches(hf: Any) -> list[Path]:
    """Where `datasets` keeps what it fetches, and what it unpacks of that."""
    from huggingface_hub import constants

    return [
        Path(hf.config.HF_CACHE_HOME),
        Path(hf.config.HF_DATASETS_CACHE),
        Path(constants.HF_HUB_CACHE),
    ]


def _load(name: str) -> Any:
    """A data set by its hub name; a folder of `save_to_disk`, of parquet files or of images; a file; a kind of files.

    Raises:
        DataError: There is none, or it cannot be read.
    """
    hf = _require(f"{SCHEME}{name}")
    # A file's own name may have a question mark.
    plain, asked = (name, {}) if expand_home(name).exists() else _read_arguments(name)
    path = expand_home(plain)
    try:
        if plain in BUILDERS and asked.keys() & {"data_dir", "data_files"}:
            _refuse(name, asked, "data_dir", "data_files", "split")
            return hf.load_dataset(plain, **asked)
        if path.is_file():
            # By its suffix: no code of the data set's own is run, here or below.
            kind = {".parquet": "parquet", ".arrow": "arrow"}.get(path.suffix.lower())
            if kind is None:
                raise ValueError("neither a folder nor a .parquet or .arrow file")
            _refuse(name, asked, "split")
            return hf.load_dataset(kind, data_files=str(path), **asked)
        if not path.is_dir():
            _refuse_kind(hf, plain)
            return hf.load_dataset(plain, **asked)
        # What `save_to_disk` leaves, of several splits and of one.
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            _refuse(name, asked, "split")
            found = hf.load_from_disk(str(path))
            return found[asked["split"]] if asked else found
        _refuse(name, asked, *(each for each in ARGUMENTS if each != "revision"))
        return hf.load_dataset(str(path.absolute()), **asked)
    # What is damaged inside of a table comes from pyarrow, whose errors are ValueErrors or these.
    except (
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        TypeError,
        hf.exceptions.DatasetsError,
    ) as error:
        raise DataError(
            "a Hugging Face data set could not be loaded",
            where=name,
            found=(str(error).splitlines() or [type(error).__name__])[0][:200],
            fix="check the name, the network or the folder",
        ) from None


def _read_arguments(name: str) -> tuple[str, dict[str, Any]]:
    """What stands before a question mark, and what `load_dataset` is told by what stands behind it.

    Raises:
        DataError: It is no argument that is known here, has no value, or is there twice.
    """
    plain, _, said = name.partition("?")
    told: dict[str, Any] = {}
    for part in filter(None, said.split("&")):
        argument, _, value = part.partition("=")
        value = unquote(value)
        if argument not in ARGUMENTS or not value:
            raise DataError(
                "a data set is asked for by an argument that is not known, or has no value",
                where=f"{SCHEME}{name}",
                found=part[:80],
                fix=f"give {', '.join(f'{each}=...' for each in ARGUMENTS)}, with & between them (and quotes for the shell)",
            )
        if argument in ("data_dir", "data_files") and plain in BUILDERS and not is_url(value):
            value = str(expand_home(value))
        if argument == "data_files":
            told.setdefault(argument, []).append(value)
        elif argument in told:
            raise DataError(
                "an argument of a data set is there twice",
                where=f"{SCHEME}{name}",
                found=f"{argument}: {told[argument]} and {value}",
                fix="give it once; data_files may be there several times",
            )
        else:
            told[argument] = value
    return plain, told


def _refuse(name: str, asked: Mapping[str, Any], *known: str) -> None:
    """Refuse arguments that would change nothing."""
    other = next((each for each in asked if each not in known), None)
    if other is not None:
        raise DataError(
            "an argument says nothing of a data set that lies in files here",
            where=f"{SCHEME}{name}",
            found=f"{other}={asked[other]}",
            fix=f"leave it out; {', '.join(known)} may be said",
        )


def _refuse_kind(hf: Any, name: str) -> None:
    """Refuse a kind of files in the place of a name: without files `load_dataset` reads whatever lies here, and some kinds run code."""
    if name in BUILDERS:
        raise DataError(
            "a kind of files is named, and no files",
            where=f"{SCHEME}{name}",
            fix=f"say which: {SCHEME}{name}?data_dir=FOLDER or {SCHEME}{name}?data_files=FILE",
        )
    if name in getattr(hf.packaged_modules, "_PACKAGED_DATASETS_MODULES", ("pandas",)):
        raise DataError(
            "a kind of files that is not read here: it may run code, or has neither images, sounds nor texts",
            where=f"{SCHEME}{name}",
            fix=f"give one of {', '.join(BUILDERS)}, or load it yourself and give the object",
        )


def _require(what: str) -> Any:
    return require("datasets", "datasets", f"the data set {what}")


def name_hub_set(name: str) -> str:
    """`set` of `hf:user/set`, of a folder or of `set.parquet`, also where arguments name the folder or the file."""
    name = _named(name) or name
    if expand_home(name).exists():
        return name_of(expand_home(name))
    plain, asked = _read_arguments(name)
    files = [asked.get("data_dir"), *asked.get("data_files", ())] if plain in BUILDERS else []
    path = expand_home(next(filter(None, files), plain))
    return name_of(path) if path.exists() else path.name


def _name_of(sets: Any) -> str:
    """What tables call themselves."""
    first = next(iter(sets.values())) if isinstance(sets, dict) else sets
    info = getattr(first, "info", None)
    return getattr(info, "dataset_name", None) or getattr(info, "builder_name", None) or "dataset"


def _find_parts(sets: Any, name: str) -> dict[str, Any]:
    """The splits that are used, training first."""
    named = dict(sets) if isinstance(sets, dict) else {"train": sets}
    if not all(hasattr(part, "__len__") and part.features for part in named.values()):
        raise DataError(
            "a data set that is streamed has no rows to ask for again, and nothing tells if it is the one of before",
            where=name,
            fix="give its parquet files, of which few row groups are in memory: hf://datasets/USER/NAME/data (in "
            "quotes, with a pattern where it has several sets); or load it without streaming=True",
        )
    found = find_splits(named, name)
    if "train" not in found:
        raise DataError(
            "a data set without a train split",
            where=name,
            found=f"splits {', '.join(named)}",
            fix="rename one to train",
        )
    parts = {split: named[found[split]] for split in ("train", "val", "test") if split in found}
    for split, part in parts.items():
        if not len(part):
            raise DataError(
                "a split without rows", where=f"{name}, split {split}", fix="leave that split out"
            )
    return parts


# Columns.


def _names_of(kind: Any) -> list[str] | None:
    """The names of classes of a `ClassLabel` or of lists of them."""
    inner = kind[0] if isinstance(kind, list) and kind else getattr(kind, "feature", kind)
    names = getattr(inner, "names", None)
    return None if names is None else list(map(str, names))


def _is_stored(kind: Any) -> bool:
    """Whether it is what images and sounds are stored as, where nothing says that they are such."""
    return isinstance(kind, dict) and kind.keys() >= {"bytes", "path"}


def _cell_maker(kind: Any) -> Callable[[Any], Any]:
    """What makes of a stored cell what a table has."""
    if type(kind).__name__ in ("Image", "Audio") or _is_stored(kind):

        def find_stored(cell: Any) -> Any:
            found = as_stored(cell)
            return None if found == Path() else found

        return find_stored
    if type(kind).__name__ in ARRAYS:
        return lambda cell: None if cell is None else np.asarray(cell, kind.dtype)
    return lambda cell: cell


def _keep_encoded(hf: Any, part: Any, column: str, name: str) -> Any:
    """A split with its images as they are stored, and nothing else."""
    part = part.select_columns([column]).with_format(None)
    kind = part.features[column]
    # Arrays and lists of numbers are images as they stand.
    if (
        type(kind).__name__ == "Image"
        or "binary" in str(getattr(kind, "dtype", ""))
        or isinstance(kind, dict)
    ):
        try:
            return part.cast_column(column, hf.Image(decode=False))
        except (ValueError, TypeError, KeyError, NotImplementedError) as error:
            raise DataError(
                "a column holds no images",
                where=f"{name}, column {column}",
                found=str(error).splitlines()[0][:200],
                fix="store images, their bytes or their paths",
            ) from None
    return part
