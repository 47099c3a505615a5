"""JSON files that are written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from restuning._errors import FormatError


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write aside, sync, rename: a reader sees all of it or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            json.dump(content, stream, indent=1)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    except OSError as error:
        raise FormatError(
            "a result cannot be written",
            where=str(file),
            found=str(error),
            fix="free space; the same command goes on from here",
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def read_json(file: Path) -> dict[str, Any]:
    """An object of a file.

    Raises:
        FormatError: Unreadable, no JSON, or no object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(
            "a result cannot be read",
            where=str(file),
            found=f"{type(error).__name__}: {error}",
            fix="restore it, or delete it and run the same command again",
        ) from None
    if not isinstance(content, dict):
        raise FormatError(
            "not a result",
            where=str(file),
            found=f"a {type(content).__name__}",
            fix="restore it, or delete it and run the same command again",
        )
    return content


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
