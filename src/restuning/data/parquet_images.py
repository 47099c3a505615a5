"""Images in the rows of parquet files: a column of bytes, of which a process holds a few row groups."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from restuning._errors import DataError
from restuning.data.digests import Tell, digest_value, quiet
from restuning.data.identity import Samples, describe_reading, label_digests
from restuning.data.kept import keep_index
from restuning.data.packed import PackedImages, refuse_changed
from restuning.data.parquet import Groups, Header, start_of_groups
from restuning.data.remote import File
from restuning.data.stored_images import StoredImages

KEPT = "parquets"
"""Folder of what was found in files, in `cache_root`: a file for each column of one. It may be deleted."""

THREADS = 2
"""Files that are looked through at once, a row group of each in memory."""

DIGEST = 32
"""Bytes of a digest."""


@dataclass(frozen=True)
class _Found:
    """What a pass over a column of a file found: a digest a row, and the rows without an image."""

    state: list[Any]
    digests: bytes
    missing: list[int]


class ImageCells(StoredImages):
    """A column of images of parquet files, the rows of all files one after the other.

    What is kept of each row is its digest, 32 bytes. A digest is that of the same bytes in a frame, in a
    column of dictionaries, or by `hf:`.

    Args:
        files: In order.
        names: What each is called in ids.
        headers: Of each.
        column: Of the images.

    Attributes:
        digests: `n 32` bytes.
        missing: Rows without an image.

    Raises:
        DataError: A file cannot be read, or its column holds something else.

    Cost: the first time a pass over the column, about 1 s a gigabyte; later a `stat` a file, or a request.
    """

    def __init__(
        self,
        files: Sequence[File],
        names: Sequence[str],
        headers: Mapping[File, Header],
        column: str,
    ) -> None:
        self.files, self.names, self.column = list(files), list(names), column
        nested = headers[files[0]].held[column]
        other = next((f for f in files if headers[f].held.get(column) != nested), None)
        if other is not None:
            raise DataError(
                "a column of images is of another type than in the first file",
                where=f"{other}, column {column}",
                found=f"the first is {files[0]}",
                fix="write all files with one schema",
            )
        self._groups = Groups(self.files, column, nested)
        self._starts = [start_of_groups(headers[file].rows) for file in files]
        counts = [sum(headers[file].rows) for file in files]
        self._firsts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

        with ThreadPoolExecutor(THREADS) as pool:
            found = list(pool.map(self._look_through, range(len(files))))
        self.states = [each.state for each in found]
        self.digests = np.frombuffer(b"".join(each.digests for each in found), np.uint8).reshape(
            -1, DIGEST
        )
        self.missing = {
            int(self._firsts[n]) + row for n, each in enumerate(found) for row in each.missing
        }

    def _look_through(self, number: int) -> _Found:
        rows = int(self._firsts[number + 1] - self._firsts[number])

        def back(content: Mapping[str, Any], state: list[Any]) -> _Found:
            digests = base64.b64decode(content["digests"], validate=True)
            missing = [int(row) for row in content["missing"]]
            if len(digests) != DIGEST * rows or not all(0 <= row < rows for row in missing):
                raise ValueError("of another number of rows")
            return _Found(state, digests, missing)

        return keep_index(
            self.files[number],
            KEPT,
            self.column,
            lambda state: self._digest(number, state),
            lambda found: {
                "digests": base64.b64encode(found.digests).decode(),
                "missing": found.missing,
            },
            back,
        )

    def _digest(self, number: int, state: list[Any]) -> _Found:
        # By itself: row groups that are held are for who reads images.
        groups = Groups(self.files, self.column, self._groups.nested)
        digests, missing = bytearray(), []
        for group in range(len(self._starts[number])):
            for cell in groups.read(number, group):
                content = cell.as_py()
                if content is None:
                    missing.append(len(digests) // DIGEST)
                digests += digest_value(content)
        return _Found(state, bytes(digests), missing)

    def __len__(self) -> int:
        """Rows of all files."""
        return int(self._firsts[-1])

    def __getitem__(self, row: Any) -> bytes:
        """The bytes of an image.

        Raises:
            DataError: There are none, or they cannot be read.
        """
        return self.read([row])[0]

    def place(self, row: int) -> tuple[int, int]:
        """The number of a row's file, and of the row in it."""
        file = int(np.searchsorted(self._firsts, row, side="right")) - 1
        return file, row - int(self._firsts[file])

    def id(self, row: int) -> str:
        """`FILE#ROW`, without the file's suffix; rows count from 0."""
        file, inside = self.place(row)
        return f"{self.names[file]}#{inside}"

    def show(self, row: int) -> str:
        """What an error calls a row."""
        file, inside = self.place(row)
        return f"{self.files[file]}, row {inside}"

    def read(self, rows: Sequence[int]) -> list[bytes]:
        """Of several images, in the order asked for, each row group once.

        Raises:
            DataError: One is not there, or cannot be read.
        """
        contents: dict[int, bytes] = {}
        for row in sorted(set(rows)):
            file, inside = self.place(row)
            starts = self._starts[file]
            group = int(np.searchsorted(starts, inside, side="right")) - 1
            found = self._groups.read(file, group)[inside - int(starts[group])].as_py()
            if found is None:
                raise self.is_missing(row)
            contents[row] = found
        return [contents[row] for row in rows]

    def is_missing(self, row: int) -> DataError:
        """The error of a row without an image."""
        return DataError(
            "a row of a parquet file holds no image",
            where=f"{self.show(row)}, column {self.column}",
            found="nothing where its bytes should be (a path is not followed)",
            fix="write the bytes of images into the column, or leave such rows out with --skip-bad",
        )

    def open(
        self,
        rows: Sequence[int],
        labels: Sequence[Any],
        transform: Callable[[Image.Image], Tensor],
        keep: bool = False,
    ) -> ParquetImages:
        """Some rows with an answer each."""
        return ParquetImages(self, rows, labels, transform, keep)


class ParquetImages(PackedImages):
    """Images in parquet files with an answer each.

    Args:
        cells: All rows.
        rows: Which of them, in order.
        labels: One for each of `rows`.
        transform: Image to tensor.
        keep: Keep transformed tensors in memory (only where the transform has no randomness).
    """

    def __init__(
        self,
        cells: ImageCells,
        rows: Sequence[int],
        labels: Sequence[Any],
        transform: Callable[[Image.Image], Tensor],
        keep: bool = False,
    ) -> None:
        super().__init__(rows, transform, keep)
        self.cells, self._labels = cells, list(labels)

    @property
    def ids(self) -> list[str]:
        """`FILE#ROW` of each."""
        return [self.cells.id(row) for row in self.rows.tolist()]

    def show(self, index: int) -> str:
        """Its file and row."""
        return self.cells.show(int(self.rows[index]))

    def label(self, index: int) -> Any:
        """As it was given."""
        return self._labels[index]

    def sample_digests(self, tell: Tell = quiet) -> Samples:
        """Those of the images' bytes, as they were when the files were looked through."""
        inputs = [self.cells.digests[row].tobytes() for row in self.rows.tolist()]
        self.forget_changed(inputs)
        return Samples(inputs, label_digests(self._labels), describe_reading(self.transform))

    def check_unchanged(self, start: int = 0, stop: int | None = None) -> None:
        """Compare the files of some images with what they were when they were looked through.

        Raises:
            DataError: One is another now.

        Cost: a `stat` a file, or a request.
        """
        for file in sorted({self.cells.place(row)[0] for row in self.rows[start:stop].tolist()}):
            refuse_changed(self.cells.files[file], self.cells.states[file])

    def read_bytes(self, indices: Sequence[int]) -> list[bytes]:
        """Of several images, in the order asked for; row groups are read whole."""
        return self.cells.read([int(self.rows[index]) for index in indices])
