"""Parquet files: which ones a name means, what their columns are, and rows of them, a row group at a time."""

from __future__ import annotations

import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from restuning._errors import DataError, RestuningError, require
from restuning._files import expand_home
from restuning.data.data import name_of
from restuning.data.remote import File, Parts, is_url
from restuning.data.shards import PARQUETS, Shards, find_shards
from restuning.data.texts import PARQUET, find_files

EXTRA, WHY = "parquet", "a table in parquet"

LARGEST_GROUP = 2**30
"""Bytes of a column in one row group, which is read as a whole."""

HELD = 256 * 2**20
"""Bytes of row groups that a process holds; two at least, for one is used while the next is read."""

_PATTERN = re.compile(r"[*?{,]")

OPEN = 4
"""Files whose footers a process holds."""


def find_parquets(name: Any) -> Shards | None:
    """The parquet files that a name means; None where it means something else.

    As `find_shards`; and of a folder with `train.parquet` these, whatever lies beside them.

    Raises:
        DataError: A pattern that no file fits, or files for judging and none for training.
    """
    if isinstance(name, str | Path) and not is_url(name):
        path = expand_home(name)
        if path.exists() and (files := find_files(path, PARQUET)):
            made = {split: File(str(file)) for split, file in files.items()}
            names = {made[split]: file.stem for split, file in files.items()}
            return Shards(name_of(path), {split: [f] for split, f in made.items()}, names)
        if not path.exists() and not _PATTERN.search(str(name)):
            return None
    return find_shards(name, PARQUETS)


@contextmanager
def explain_damage(file: Any) -> Iterator[None]:
    """What pyarrow says of a file, as an error that names it."""
    try:
        yield
    except RestuningError:
        raise
    # pyarrow's own are of these kinds.
    except (OSError, ValueError, KeyError, NotImplementedError, OverflowError) as error:
        raise DataError(
            "a parquet file cannot be read",
            where=str(file),
            found=(str(error).splitlines() or [type(error).__name__])[0][:200],
            fix="restore it from where it came from",
        ) from None


def open_parquet(file: Path, extra: str, why: str) -> Any:
    """A parquet file as a table of pyarrow.

    Args:
        file: One file.
        extra: That brings pyarrow.
        why: What it is opened for, as the error says it where pyarrow is missing.

    Raises:
        DataError: It cannot be read.
        MissingExtraError: There is no pyarrow.
    """
    parquet = require("pyarrow.parquet", extra, why)
    # `read_table` knows no file with a column twice, whichever is wanted of it.
    with explain_damage(file), parquet.ParquetFile(file) as opened:
        return opened.read()


@dataclass(frozen=True)
class Header:
    """What the footer of a parquet file says.

    Attributes:
        names: Of its columns, of which one may be there twice.
        held: Of columns of bytes, or of Hugging Face's `{"bytes", "path"}`: whether it is the latter.
        classes: Names of classes, by column, where Hugging Face's `ClassLabel` says them.
        rows: Of each row group.
    """

    names: list[str]
    held: Mapping[str, bool]
    classes: Mapping[str, list[str]]
    rows: list[int]


def read_header(file: File) -> Header:
    """The footer of a file.

    Raises:
        DataError: It cannot be read.
        MissingExtraError: There is no pyarrow.
    """
    with _opened(file) as opened:
        schema, about = opened.schema_arrow, opened.metadata
        held = {
            field.name: nested
            for field in schema
            if (nested := _holds_bytes(field.type)) is not None
        }
        rows = [about.row_group(n).num_rows for n in range(about.num_row_groups)]
        return Header(list(schema.names), held, _find_classes(schema.metadata), rows)


def read_columns(file: File, columns: Sequence[str]) -> dict[str, list[Any]]:
    """Some columns of a file, whole, each of which is there once.

    Raises:
        DataError: They cannot be read.
    """
    if not columns:
        return {}
    with _opened(file) as opened:
        table = opened.read(columns=list(columns), use_threads=False)
        return {name: table.column(name).to_pylist() for name in columns}


@contextmanager
def _opened(file: File) -> Iterator[Any]:
    parquet = require("pyarrow.parquet", EXTRA, WHY)
    with explain_damage(file), parquet.ParquetFile(Parts(file), pre_buffer=False) as opened:
        yield opened


def _holds_bytes(kind: Any) -> bool | None:
    """Whether a type of bytes stands inside of a struct; None of one that is none."""
    import pyarrow.types as types

    def is_bytes(each: Any) -> bool:
        return types.is_binary(each) or types.is_large_binary(each)

    if is_bytes(kind):
        return False
    inside = types.is_struct(kind) and [f for f in kind if f.name == "bytes"]
    return True if inside and len(inside) == 1 and is_bytes(inside[0].type) else None


def _find_classes(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """What `datasets` writes into a schema, of classes and of lists of them; nothing of what is written otherwise."""
    try:
        said = json.loads((metadata or {})[b"huggingface"])
        features = said["info"]["features"]
        inner = {
            column: kind.get("feature", kind) if isinstance(kind, dict) else kind
            for column, kind in features.items()
        }
        return {
            str(column): list(map(str, kind["names"]))
            for column, kind in inner.items()
            if isinstance(kind, dict)
            and kind.get("_type") == "ClassLabel"
            and isinstance(kind.get("names"), list)
        }
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


class Groups:
    """Row groups of one column of several files, as a process reads them: a few are held.

    Args:
        files: Of which some may be read again and again.
        column: Of bytes.
        nested: Whether they stand in `bytes` of a struct.
    """

    def __init__(self, files: Sequence[File], column: str, nested: bool) -> None:
        self.files, self.column, self.nested = files, column, nested
        self._begin()

    def _begin(self) -> None:
        self._process, self._lock = os.getpid(), threading.Lock()
        self._held: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._open: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """For a worker process, which reads by itself."""
        return {"files": self.files, "column": self.column, "nested": self.nested}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._begin()

    def read(self, file: int, group: int) -> Any:
        """Bytes of the rows of a group, an array of pyarrow with nulls where there are none.

        Raises:
            DataError: It cannot be read, or is too large to be read whole.
        """
        if self._process != os.getpid():
            # Another thread may have had the lock when this process was forked.
            self._begin()
        with self._lock:
            if (file, group) in self._held:
                self._held.move_to_end((file, group))
                return self._held[file, group]
            with explain_damage(self.files[file]):
                found = self._read(file, group)
            self._held[file, group] = found
            while len(self._held) > 2 and sum(each.nbytes for each in self._held.values()) > HELD:
                self._held.popitem(last=False)
            return found

    def _read(self, file: int, group: int) -> Any:

        opened = self._file(file)
        about = opened.metadata.row_group(group)
        wanted = f"{self.column}.bytes" if self.nested else self.column
        leaves = [about.column(n) for n in range(about.num_columns)]
        size = sum(e.total_uncompressed_size for e in leaves if e.path_in_schema == wanted)
        if size > LARGEST_GROUP:
            raise DataError(
                "a row group is too large to be read whole",
                where=f"{self.files[file]}, row group {group}, column {self.column}",
                found=f"{size / 2**30:.1f} GiB in {about.num_rows:,} rows",
                fix="write the file again in smaller ones: pyarrow.parquet.write_table(table, file, row_group_size=1000)",
            )
        column = opened.read_row_group(group, columns=[wanted], use_threads=False).column(
            self.column
        )
        if self.nested:
            # Of the struct this alone was read; a struct that is null has null bytes.
            (column,) = column.flatten()
        return column.combine_chunks()

    def _file(self, file: int) -> Any:
        import pyarrow.parquet as parquet

        if file not in self._open:
            self._open[file] = parquet.ParquetFile(Parts(self.files[file]), pre_buffer=False)
        self._open.move_to_end(file)
        while len(self._open) > OPEN:
            self._open.popitem(last=False)
        return self._open[file]


def start_of_groups(rows: Sequence[int]) -> np.ndarray:
    """The first row of each group of a file."""
    return (
        np.concatenate([[0], np.cumsum(rows)[:-1]]).astype(np.int64)
        if len(rows)
        else np.zeros(0, np.int64)
    )
