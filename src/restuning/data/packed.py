"""Images that lie many in one file (a tar, a parquet file): a batch of neighbours is one reading, and the next is read ahead."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info

from restuning._errors import DataError
from restuning.backbones.images import Least, Measured, measure, read_image
from restuning.backbones.preprocessing import least_for
from restuning.data.data import ImageDataset
from restuning.data.remote import File


class PackedImages(ImageDataset):
    """Images in a few large files, known by their bytes.

    Args:
        rows: Which of all images of the files, in order.
        transform: Image to tensor.
        keep: Keep transformed tensors in memory (only where the transform has no randomness).
    """

    def __init__(
        self,
        rows: Sequence[int] | np.ndarray,
        transform: Callable[[Image.Image], Tensor],
        keep: bool = False,
    ) -> None:
        super().__init__(transform, keep)
        self.rows = np.asarray(rows, np.int64)
        self._ahead: _Ahead | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For a worker process, which reads ahead itself."""
        return {**super().__getstate__(), "_ahead": None}

    def __len__(self) -> int:
        """Number of images."""
        return len(self.rows)

    @abstractmethod
    def show(self, index: int) -> str:
        """What an error calls an image."""

    @abstractmethod
    def read_bytes(self, indices: Sequence[int]) -> list[bytes]:
        """Of several images, in the order asked for; neighbours in one reading."""

    def image(self, index: int, least: Least | None = None) -> Image.Image:
        """Decoded.

        Raises:
            DataError: It cannot be read.
        """
        return read_image(self.read_bytes([index])[0], self.show(index), least)

    def measure(self, index: int) -> Measured:
        """By its header."""
        return measure(self.read_bytes([index])[0], self.show(index))

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Any]]:
        """Several images, read together."""
        return self.make(indices, self.fetch(indices))

    def fetch(self, indices: Sequence[int]) -> list[bytes | None]:
        """Bytes of several images; None of those whose tensors are in memory. The next as many are read ahead."""
        asked = list(map(int, indices))
        if self._ahead is None or not self._ahead.mine:
            # Threads are not there in a process that was forked.
            self._ahead = _Ahead()
        wanted = self._not_held(asked)
        found = self._ahead.take(wanted)
        found = self.read_bytes(wanted) if found is None else found
        if asked and asked == list(range(asked[0], asked[0] + len(asked))):
            worker = get_worker_info()
            # Of several loader processes each gets a batch in turns.
            start = asked[0] + len(asked) * (worker.num_workers if worker else 1)
            more = self._not_held(range(start, min(start + len(asked), len(self))))
            if more:
                self._ahead.begin(more, self.read_bytes)
        known = dict(zip(wanted, found, strict=True))
        return [known.get(index) for index in asked]

    def _not_held(self, indices: Iterable[int]) -> tuple[int, ...]:
        held = self.in_memory or {}
        return tuple(index for index in indices if index not in held)

    def make(
        self, indices: Sequence[int], contents: Sequence[bytes | None]
    ) -> list[tuple[Tensor, Any]]:
        """Images of their bytes, and their labels."""
        made, least = [], least_for(self.transform)
        for index, content in zip(indices, contents, strict=True):
            if content is None:
                made.append(self[index])
            else:
                tensor = self.transform(read_image(content, self.show(index), least))
                self.hold(index, tensor)
                made.append((tensor, self.label(index)))
        return made


class _Ahead:
    """What a thread reads while its process does something else."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._pool = ThreadPoolExecutor(1)
        self._wanted: tuple[int, ...] = ()
        self._found: Future[list[bytes]] | None = None

    @property
    def mine(self) -> bool:
        """Whether it was made in this process."""
        return self._process == os.getpid()

    def begin(self, indices: tuple[int, ...], read: Callable[[Sequence[int]], list[bytes]]) -> None:
        self._wanted, self._found = indices, self._pool.submit(read, indices)

    def take(self, indices: tuple[int, ...]) -> list[bytes] | None:
        """What was read of these; None where others were."""
        found, self._found = self._found, None
        return found.result() if found is not None and indices == self._wanted else None


def refuse_changed(file: File, before: Sequence[Any]) -> None:
    """Compare a file with what it was when it was looked through.

    Raises:
        DataError: It is another now.

    Cost: a `stat`, or a request.
    """
    if file.state() != before:
        raise DataError(
            "the data changed while they were read",
            where=str(file),
            found="another file than at the start",
            fix="let nothing write to it, and run the same command again: what was read since is not kept",
        )
