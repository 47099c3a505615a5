"""A column of images that stay where they lie, encoded, and are read when asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from restuning._errors import DataError
from restuning.backbones.images import read_image
from restuning.data.data import ImageDataset


class StoredImages(Sequence, ABC):
    """Images of a table, the rows of all its splits one after the other.

    Attributes:
        missing: Rows without an image.
    """

    missing: set[int]

    @abstractmethod
    def __getitem__(self, row: Any) -> Any:
        """An image as `read_image` takes it.

        Raises:
            DataError: There is none, or it cannot be read.
        """

    @abstractmethod
    def id(self, row: int) -> str:
        """What a row is called where rows are listed."""

    @abstractmethod
    def show(self, row: int) -> str:
        """What an error calls a row."""

    @abstractmethod
    def is_missing(self, row: int) -> DataError:
        """The error of a row without an image."""

    @abstractmethod
    def open(
        self,
        rows: Sequence[int],
        labels: Sequence[Any],
        transform: Callable[[Image.Image], Tensor],
        keep: bool = False,
    ) -> ImageDataset:
        """Some rows with an answer each, as a data set."""

    def drop_corrupt(self, rows: Sequence[int]) -> tuple[list[int], list[int]]:
        """Rows whose images decode, and rows whose images do not."""
        good, bad = [], []
        for row in rows:
            try:
                read_image(self[row], self.show(row))
            except DataError:
                bad.append(row)
                continue
            good.append(row)
        return good, bad

    def pick(self, rows: Sequence[int]) -> Sequence[Any]:
        """Some rows, read when asked for."""
        return _Picked(self, rows)


class _Picked(Sequence):
    def __init__(self, cells: StoredImages, rows: Sequence[int]) -> None:
        self.cells, self.rows = cells, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: Any) -> Any:
        return self.cells[self.rows[number]]
