"""Files by path or by URL, read alike: what they are, what is in them, whether they changed.

A URL is one that a user typed. Nothing that a file says is ever taken for one.
"""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

from restuning._errors import DataError, MissingExtraError, RestuningError
from restuning._files import file_state, open_plain

T = TypeVar("T")

TRIES = 4
"""Of a request that fails by the network's fault: after 1, 2 and 4 seconds again."""

PAUSE = 1.0
"""Seconds before the second try; each later one waits twice as long."""

BLOCK = 8 * 2**20
"""Bytes of a request while a remote file is read from its beginning."""

MARKS = ("ETag", "etag", "generation", "md5Hash", "blob_id", "sha256", "LastModified")
TIMES = ("last_modified", "mtime", "created")
"""What a store says of a file's contents and times, whichever of them its kind says."""

_URL = re.compile(r"[a-z][a-z0-9+.-]*://.", re.IGNORECASE)


def is_url(name: Any) -> bool:
    """Whether a name is a URL, such as `s3://bucket/folder`."""
    return isinstance(name, str) and _URL.match(name) is not None


def show_url(name: str) -> str:
    """A URL as it may be printed: without a password, and without what signs it."""
    if not is_url(name):
        return name
    parts = urlsplit(name)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"


@dataclass(frozen=True)
class File:
    """One file, here or elsewhere.

    Attributes:
        name: Its path or URL.
    """

    name: str

    def __str__(self) -> str:
        """As it may be printed."""
        return show_url(self.name)

    def known_state(self) -> list[Any] | None:
        """What changes whenever its contents do, for keeping what was made of them; None where nothing tells.

        Of a path inode, size and times (`file_state`), of a URL its size, and etag or time.

        Raises:
            DataError: It is not there.
        """
        if is_url(self.name):
            state = self.state()
            return state if len(state) > 1 else None
        state = _local(self.name, lambda path: file_state(path))
        return None if state is None else list(state)

    def state(self) -> list[Any]:
        """As `known_state`, also of a file that was just written: to compare within a process.

        Raises:
            DataError: It is not there.
        """
        if is_url(self.name):
            told = call(self.name, _ask)
            marks = [str(told[each]) for each in MARKS if told.get(each)]
            marks = marks or [str(told[each]) for each in TIMES if told.get(each)]
            return [told.get("size"), *marks]
        about = _local(self.name, os.stat)
        return [about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns]

    def size(self) -> int:
        """Its bytes.

        Raises:
            DataError: It is not there, or nothing tells.
        """
        if not is_url(self.name):
            return _local(self.name, lambda path: path.stat().st_size)
        size = self.state()[0]
        if size is None:
            raise DataError(
                "nothing tells how large a file is",
                where=str(self),
                fix="copy it to a disk, or serve it so that parts of it can be asked for",
            )
        return int(size)

    def through(self, use: Callable[[BinaryIO], T]) -> T:
        """What is made of its bytes from the beginning, in a stream that can be moved.

        Args:
            use: Called again with another stream where the network fails.

        Raises:
            DataError: It cannot be read.
        """

        def read(system: Any, path: str) -> T:
            with system.open(path, "rb", block_size=BLOCK) as stream:
                return use(stream)

        def read_here(path: Path) -> T:
            with open_plain(path) as stream:
                return use(stream)

        return call(self.name, read) if is_url(self.name) else _local(self.name, read_here)

    def read(self, start: int, stop: int) -> bytes:
        """Some of its bytes.

        Raises:
            DataError: They cannot be read, or it is shorter.
        """
        if is_url(self.name):
            # By name: s3's takes a version in second place.
            found = call(
                self.name, lambda system, path: system.cat_file(path, start=start, end=stop)
            )
        else:
            found = _local(self.name, lambda path: _read(path, start, stop))
        if len(found) != stop - start:
            raise DataError(
                "a file is shorter than it was",
                where=str(self),
                found=f"{len(found):,} bytes from {start:,}, {stop - start:,} wanted",
                fix="let nothing write to it, and run the same command again",
            )
        return found


def _ask(system: Any, path: str) -> Any:
    # What was listed a while ago is remembered, and would be told again of an object that was put since.
    system.invalidate_cache(path)
    return system.info(path)


class Parts(io.RawIOBase):
    """A file as readers take it that ask for parts of one: each part is a request, made again where the network fails.

    Args:
        file: Read from anywhere.
    """

    def __init__(self, file: File) -> None:
        self.file, self._at, self._size = file, 0, file.size()

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Where the next part begins."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go there."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        """The next bytes.

        Raises:
            DataError: They cannot be read, or the file is shorter than it was.
        """
        stop = self._size if size is None or size < 0 else min(self._size, self._at + size)
        if stop <= self._at:
            return b""
        found = self.file.read(self._at, stop)
        self._at = stop
        return found

    def readinto(self, buffer: Any) -> int:
        """Likewise, into a buffer."""
        found = self.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)


def _read(path: Path, start: int, stop: int) -> bytes:
    with open_plain(path) as stream:
        stream.seek(start)
        return stream.read(stop - start)


def _local(name: str, use: Callable[[Path], T]) -> T:
    try:
        return use(Path(name))
    except OSError as error:
        raise DataError(
            "a file cannot be read",
            where=name,
            found=error.strerror or str(error),
            fix="restore it, or correct its name",
        ) from None


def call(url: str, use: Callable[[Any, str], T]) -> T:
    """What a file system of fsspec says, asked again where the network fails.

    Args:
        url: Typed by the user.
        use: Receives the file system and the path in it.

    Raises:
        DataError: It is not there, may not be read, or fails each time; the URL is named.
        MissingExtraError: Its kind needs a library that is not installed.
    """
    import fsspec

    for number in range(TRIES):
        try:
            system, path = fsspec.core.url_to_fs(url)
            return use(system, path)
        except RestuningError:
            raise
        except ImportError as error:
            raise MissingExtraError(
                f"{urlsplit(url).scheme}:// needs a library that is not installed",
                where=show_url(url),
                found=str(error).splitlines()[0][:200],
                fix="pip install 'restuning[remote]' (s3, https); of other kinds the library that is named",
            ) from None
        except (
            FileNotFoundError,
            PermissionError,
            IsADirectoryError,
            NotImplementedError,
        ) as error:
            raise _failed(url, error) from None
        except ValueError as error:
            # No such protocol, or a URL that is none.
            raise _failed(url, error) from None
        # Each kind of store has errors of its own, of which few are OSErrors.
        except Exception as error:  # noqa: BLE001
            if number + 1 == TRIES:
                raise _failed(url, error) from None
            time.sleep(PAUSE * 2**number)
    raise AssertionError("every try returns or raises")


def _failed(url: str, error: Exception) -> DataError:
    there = isinstance(error, FileNotFoundError)
    found = (str(error).splitlines() or [""])[0][:200]
    return DataError(
        "nothing is there" if there else "a URL cannot be read",
        where=show_url(url),
        # What failed may say the whole URL again, with what signs it.
        found=type(error).__name__
        if "?" in url or "@" in url
        else f"{type(error).__name__}: {found}",
        fix="check the URL, the network, and how this machine signs in there",
    )


def list_files_of(url: str) -> list[str]:
    """URLs of the files in a folder, at any depth and in the order of their names.

    Raises:
        DataError: It is not there, or cannot be listed.
    """
    return _find(url, lambda system, path: system.find(path))


def list_fitting(url: str) -> list[str]:
    """URLs of the files that fit a pattern with `*` or `?`, in the order of their names.

    Raises:
        DataError: The place cannot be listed.
    """
    return _find(url, lambda system, path: system.glob(path))


def _find(url: str, use: Callable[[Any, str], list[str]]) -> list[str]:
    def find(system: Any, path: str) -> list[str]:
        system.invalidate_cache()
        return sorted(system.unstrip_protocol(each) for each in use(system, path))

    return call(url, find)
