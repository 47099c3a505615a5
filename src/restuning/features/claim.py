"""A claim on a shard: held by one living process, given back by the system when it dies."""

from __future__ import annotations

from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows: two writers may compute one shard; either's file is right.
    fcntl = None


class Claim:
    """An exclusive lock on a file; see `take`."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    @classmethod
    def take(cls, file: Path, *, wait: bool) -> Claim | None:
        """Claim a file, or None if another process holds it and we do not wait."""
        stream = file.open("wb")
        if fcntl is not None:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                stream.close()
                return None
            except OSError:
                # A file system without locks: work is done twice at worst.
                pass
        return cls(stream)

    def give_back(self) -> None:
        """Let others have it."""
        self._stream.close()
