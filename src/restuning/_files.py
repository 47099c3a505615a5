"""Files that are written whole or not at all, and locks that a dying process gives back."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from restuning._errors import FormatError, TrainingError

SUFFIX = ".partial"
ABANDONED = 24 * 3600
"""Seconds after which a partial file of another machine counts as left by a process that died."""

SETTLED = 3.0
"""Seconds after its last change from when a file that changes again has another time: the coarsest
clock of a file system (FAT) has steps of two."""

REMEMBERED = 2**20
"""Digests of files that a process remembers; beyond, it forgets them all and begins again."""

_digests: dict[str, tuple[tuple[int, ...], str]] = {}
_counter = itertools.count()
_machine = socket.gethostname().replace(".", "-")


@contextmanager
def replacing(path: Path, *, suffix: str = "") -> Iterator[Path]:
    """A place beside a file or folder; what is written there takes its name at the end, at once.

    A reader sees all of it or nothing, and what was there before stays whole if anything fails.
    The data are on the disk before the name is. What processes that died left aside is removed.

    Args:
        path: Of the file or folder; its parent is made.
        suffix: With which the place ends, for a library that looks at it.

    Raises:
        OSError: The disk is full or cannot be written; nothing is left aside.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    # One name a writer: two processes that write the same file do not meet before the rename.
    partial = path.with_name(
        f".{path.name}.{_machine}.{os.getpid()}.{next(_counter)}{SUFFIX}{suffix}"
    )
    try:
        yield partial
        _sync_all(partial)
        partial.replace(path)
        _sync(path.parent)
    finally:
        _remove(partial)


def _remove_abandoned(path: Path) -> None:
    for partial in path.parent.glob(f".{path.name}.*{SUFFIX}*"):
        machine, pid, *_ = partial.name.removeprefix(f".{path.name}.").split(".")
        try:
            if machine == _machine and pid.isdigit() and os.name == "posix":
                gone = not _alive(int(pid))
            else:
                gone = time.time() - partial.stat().st_mtime > ABANDONED
        except OSError:  # Its writer was faster.
            continue
        if gone:
            _remove(partial)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # Somebody else's.
        return True
    return True


def _remove(path: Path) -> None:
    with suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _sync_all(path: Path) -> None:
    if path.is_dir():
        for each in path.rglob("*"):
            _sync(each)
    _sync(path)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder; its rename is durable with the journal.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: It cannot be written.
    """
    with replacing(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Write a text as UTF-8, whole or not at all.

    Raises:
        OSError: It cannot be written.
    """
    write_bytes(path, content.encode())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object as JSON, whole or not at all; what JSON does not know is written as a text.

    Raises:
        FormatError: It cannot be written.
    """
    try:
        write_text(path, json.dumps(content, indent=1, default=str) + "\n")
    except OSError as error:
        raise FormatError(
            "a result cannot be written",
            where=str(path),
            found=error.strerror or str(error),
            fix="free space; the same command goes on from here",
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """An object of a file.

    Raises:
        FormatError: Unreadable, no JSON, or no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(
            "a result cannot be read",
            where=str(path),
            found=f"{type(error).__name__}: {error}",
            fix="restore it, or delete it and run the same command again",
        ) from None
    if not isinstance(content, dict):
        raise FormatError(
            "not a result",
            where=str(path),
            found=f"a {type(content).__name__}",
            fix="restore it, or delete it and run the same command again",
        )
    return content


def sha256_of_file(file: Path) -> str:
    """sha256 of a file's bytes, 64 hexadecimal digits; about 1 s a gigabyte, and no memory."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def digest_file(file: Path) -> str:
    """As `sha256_of_file`, but a file that did not change is read once a process.

    Sets of weights of one architecture have one size, as images of one camera may, and files of
    one archive often one time; a copy that keeps its time still has a new change time or another
    inode. All of these are compared, and a file that was just written is remembered by none.

    Raises:
        OSError: It cannot be read.

    Cost: about 1 s a gigabyte, once.
    """
    state, path = _state(file), os.path.abspath(file)
    known = _digests.get(path)
    if state is not None and known is not None and known[0] == state:
        return known[1]
    digest = sha256_of_file(file)
    # Written meanwhile: what was read belongs to neither state.
    if state is not None and _state(file) == state:
        if len(_digests) >= REMEMBERED:
            _digests.clear()
        _digests[path] = state, digest
    return digest


def _state(file: Path) -> tuple[int, ...] | None:
    """What changes whenever a file does; None where a change might leave it as it is."""
    about = file.stat()
    # Windows has no change time: contents written in place, their time put back, would not show.
    if os.name == "nt" or time.time() - max(about.st_mtime, about.st_ctime) < SETTLED:
        return None
    return about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns


def refuse_other(
    before: Mapping[str, Any], now: Mapping[str, Any], folder: Path, *, what: str, fix: str
) -> None:
    """Refuse a folder that was begun under another description.

    Args:
        before: The description that lies there.
        now: That of this call.
        folder: Where it lies.
        what: The error, such as "this folder holds another sweep".
        fix: What to do next.

    Raises:
        TrainingError: They differ; it names everything that does, then and now.
    """
    told = differences(before, now)
    if told:
        raise TrainingError(what, where=str(folder), found="; ".join(told)[:600], fix=fix)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`lr: 0.1 then, 0.2 now` for every name whose values differ, inside of objects as well."""
    lines: list[str] = []
    for name in {**before, **now}:
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new)
        elif old != new:
            lines.append(f"{name}: {old!r} then, {new!r} now")
    return lines


class Claim:
    """An exclusive lock on a file; see `take`. The system gives it back when its process dies."""

    def __init__(self, lock: FileLock | None) -> None:
        self._lock = lock

    @classmethod
    def take(cls, path: Path, *, wait: bool) -> Claim | None:
        """Claim a file, or None if another process has it and we do not wait.

        Args:
            path: The lock file; its folder is made.
            wait: Until it is free.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=-1 if wait else 0)
        try:
            lock.acquire()
        except Timeout:
            return None
        except (OSError, NotImplementedError):
            # A file system without locks: work is done twice at worst, for every result is whole.
            return cls(None)
        return cls(lock)

    def give_back(self) -> None:
        """Let others have it."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *error: object) -> None:
        self.give_back()
