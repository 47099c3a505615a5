"""`log.jsonl`: one line for every few steps and one for every epoch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from restuning._errors import TrainingError


class Journal:
    """The log of a run. A resumed run cuts it back to its checkpoint, so no line stands twice.

    Args:
        path: The file.
        position: Bytes to keep of what is there.

    Raises:
        TrainingError: It cannot be written.
    """

    def __init__(self, path: Path, position: int = 0) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = path.open("ab")
            size = path.stat().st_size
            self._file.truncate(min(position, size))
            self._file.seek(0, os.SEEK_END)
        except OSError as error:
            raise self._failed(error) from None

    def write(self, line: Mapping[str, Any]) -> None:
        """Add a line; it reaches the file at once, so that a reader can follow."""
        try:
            self._file.write((json.dumps(line) + "\n").encode())
            self._file.flush()
        except OSError as error:
            raise self._failed(error) from None

    def position(self) -> int:
        """Bytes so far, all of them on the disk."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failed(error) from None
        return self._file.tell()

    def close(self) -> None:
        """Close the file; what a full disk refuses now, a resumed run writes again."""
        try:
            self._file.close()
        except OSError:
            return

    def _failed(self, error: OSError) -> TrainingError:
        return TrainingError(
            "the log cannot be written",
            where=str(self.path),
            found=error.strerror or str(error),
            fix="free space or make the folder writable, and run the same command again: it goes "
            "on from the last checkpoint",
        )
