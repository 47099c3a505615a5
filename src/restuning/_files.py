"""Files: written whole or not at all, read without trust, and locked until a process dies."""

from __future__ import annotations

import csv
import errno
import hashlib
import itertools
import json
import math
import os
import secrets
import shutil
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Any, BinaryIO, Literal, Union, get_args, get_origin, get_type_hints

from restuning._errors import FormatError, TrainingError
from restuning.runtime.processes import is_main_process

SUFFIX = ".partial"
ABANDONED = 24 * 3600
"""Seconds after which a partial file of another machine counts as left by a process that died."""

SETTLED = 3.0
"""Seconds after its last change from when a file that changes again has another time: the coarsest
clock of a file system (FAT) has steps of two."""

LONGEST_TOLD = 2000
"""Letters of what differs between two descriptions: all that a run is known by, with two values each."""

REMEMBERED = 2**20
"""Digests of files that a process remembers; beyond, it forgets them all and begins again."""

FileState = tuple[int, int, int, int]
"""Inode, size, and times of the last write and the last change in nanoseconds."""

_digests: dict[str, tuple[FileState, str]] = {}
_counter = itertools.count()
_machine = socket.gethostname().replace(".", "-")


@contextmanager
def replacing(path: Path, *, suffix: str = "", apart: bool = False) -> Iterator[Path]:
    """A place beside a file or folder; what is written there takes its name at the end, at once.

    A reader sees all of it or nothing, and what was there before stays whole if anything fails.
    The data are on the disk before the name is. What processes that died left aside is removed.

    Args:
        path: Of the file or folder; its parent is made.
        suffix: With which the place ends, for a library that looks at it.
        apart: In a folder of its own: what a library puts beside a file while it writes it (safetensors does) is
            then removed with it, should the process die.

    Raises:
        OSError: The disk is full or cannot be written; nothing is left aside.
    """
    made = _make_parents(path)
    _remove_abandoned(path)
    # One name a writer: two processes that write the same file do not meet before the rename.
    partial = path.with_name(
        # And none that somebody could foresee: a link that waits there would be followed.
        f".{path.name}.{_machine}.{os.getpid()}.{next(_counter)}-{secrets.token_hex(4)}{SUFFIX}{suffix}"
    )
    place = partial / path.name if apart else partial
    try:
        if apart:
            partial.mkdir()
        yield place
        sync(place)
        place.replace(path)
        _sync(path.parent)
    finally:
        _remove(partial)
        # After a failure they are empty: a mistyped path leaves nothing.
        _remove_empty(made)


def _make_parents(path: Path) -> list[Path]:
    """Make the folders above a path; those that were not there, the innermost first."""
    missing = [each for each in path.parents if not each.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        _remove_empty(missing)
        raise
    return missing


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


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
        folder = path.is_dir() and not path.is_symlink()
        shutil.rmtree(path) if folder else path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or a folder with all that is in it, is on the disk.

    Raises:
        OSError: It cannot be written there.
    """
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


def try_writing(path: Path) -> None:
    """Find out whether a file or folder of a name could be written, and leave nothing.

    Raises:
        OSError: It could not: the disk is full, or its folder cannot be made or written, or a folder is
            in the way of a file, or its name is too long.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder of this name is there")
    with suppress(_TriedError), replacing(path) as aside:
        aside.write_bytes(bytes(4096))
        raise _TriedError


class _TriedError(Exception):
    pass


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


def write_json(path: Path, content: Mapping[str, Any], *, sealed: bool = False) -> None:
    """Write an object as JSON, whole or not at all; what JSON does not know is written as a text.

    A number that is not finite is written as null, for JSON has no word for it.

    Args:
        path: Of the file.
        content: By name.
        sealed: With the sha256 of the rest in it (`seal`), which `read_json` compares.

    Raises:
        FormatError: It cannot be written.
    """
    try:
        content = seal(content) if sealed else _as_json(content)
        write_text(path, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise FormatError(
            "a result cannot be written",
            where=str(path),
            found=error.strerror or str(error),
            fix="free space; the same command goes on from here",
        ) from None


ROWS = (".csv", ".jsonl")
"""What files of rows are called: a table with a line of titles, and an object of JSON a line."""


@contextmanager
def writing_rows(path: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that takes one row after the other; the file has its name when all are in, and none before.

    Args:
        path: `.csv`, whose columns are those of the first row, or `.jsonl`.

    Raises:
        FormatError: Another suffix, or it cannot be written; nothing is left aside. What the body raises is raised as it is.
    """
    if path.suffix.lower() not in ROWS:
        raise FormatError(
            "rows are written as a table or as lines of JSON",
            where=str(path),
            found=path.suffix or "no suffix",
            fix=f"call it {path.name or 'answers'}.csv or .jsonl",
        )

    def fail(error: OSError) -> FormatError:
        return FormatError(
            "rows cannot be written",
            where=str(path),
            found=error.strerror or str(error),
            fix="free space, make the folder writable, or give another place",
        )

    of_body: BaseException | None = None
    try:
        # Names of files may be none of UTF-8.
        how: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
        with replacing(path) as partial, partial.open("w", **how) as file:
            table: csv.DictWriter | None = None

            def write(row: Mapping[str, Any]) -> None:
                nonlocal table
                try:
                    if path.suffix.lower() != ".csv":
                        file.write(json.dumps(_as_json(row), ensure_ascii=False) + "\n")
                        return
                    if table is None:
                        table = csv.DictWriter(file, list(row), lineterminator="\n")
                        table.writeheader()
                    table.writerow(row)
                except OSError as error:
                    raise fail(error) from None

            try:
                yield write
            except BaseException as error:
                of_body = error
                raise
            # Closed before it takes its name.
            file.close()
    except OSError as error:
        # Such as of an input that cannot be read.
        if error is of_body:
            raise
        raise fail(error) from None


JSON_BYTES = 64 * 2**20
"""Of the largest JSON that is read: the manifest of a store of 200,000 shards."""
JSON_VALUES = 2**20
"""The most values of it: an empty list takes three bytes of a file and sixty of memory."""
JSON_DEPTH = 64
"""The most lists and objects inside of each other; ours have seven."""
_WHOLE = 2**63
"""Beyond it a number that is read as whole fits into no tensor, and into no other library."""
SEAL = "sha256 of the rest"
"""Name under which an object of JSON holds the digest of everything else in it."""
RESTORE = "restore it, or delete it and run the same command again"


def expand_home(path: str | Path) -> Path:
    """A path with the home folder in place of `~`; where there is none of that user, as it is."""
    return Path(os.path.expanduser(path))


def lies_inside(path: Path, *folders: Path) -> bool:
    """Whether a path is below one of some folders, links followed; what links to itself in a circle is below none.

    Raises:
        ValueError: No file can have such a name.
    """
    real = Path(os.path.realpath(path))
    try:
        real.stat()
    except OSError as error:
        # `resolve` tells a circle in some versions of Python, and gives a path in others.
        if error.errno == errno.ELOOP:
            return False
    return any(real.is_relative_to(os.path.realpath(folder)) for folder in folders)


def open_plain(path: Path) -> BinaryIO:
    """Open a file for reading that is one: what a folder of others names may be anything.

    A pipe would be waited for without end, and opening a device may do something. Links are
    followed, to a file; who must stay inside of a folder compares the path before.

    Raises:
        OSError: It is not there, cannot be read, or is a folder, pipe, socket or device; its
            `strerror` says so.
    """
    refuse_special(path)
    # Without waiting, should it have become a pipe since.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _BINARY)
    try:
        _refuse_special(os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


_BINARY = getattr(os, "O_BINARY", 0)
_SPECIAL = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFLNK: "a link",
}


def refuse_special(path: Path) -> None:
    """Refuse what is no file, before a library opens it by its name; see `open_plain`.

    Raises:
        OSError: It is not there, or no file.
    """
    _refuse_special(os.stat(path).st_mode)


def _refuse_special(mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _SPECIAL.get(stat.S_IFMT(mode), "something else")
        raise OSError(errno.EINVAL, f"{kind}, not a file")


def read_bytes(path: Path, limit: int | None = None) -> bytes:
    """The contents of a file that is one; see `open_plain`.

    Args:
        path: Of the file.
        limit: The most bytes that are read; None for any number.

    Raises:
        OSError: It cannot be read, is no file, or is larger.
    """
    with open_plain(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if limit is not None and size > limit:
            raise OSError(errno.EFBIG, f"{size:,} bytes, and at most {limit:,} are read")
        return stream.read()


def parse_json(text: str | bytes, where: str, *, what: str = "a result", fix: str = RESTORE) -> Any:
    """What a text of JSON says, which may come from anybody.

    Refused are: bytes that are not UTF-8, half of a surrogate pair, NaN and infinite numbers, whole
    numbers of more than 64 bits, a name that stands twice in an object, and more than `JSON_BYTES`,
    `JSON_VALUES` or `JSON_DEPTH`. An object with a `seal` is compared with it, and returned without.

    Args:
        text: Of the file.
        where: The file, for errors.
        what: It is, for errors: "a result".
        fix: What to do next where it cannot be read.

    Raises:
        FormatError: It cannot be read, or is not what was sealed.
    """
    try:
        return _parse_json(text)
    except ValueError as error:
        raise _unreadable(what, where, str(error), fix) from None


def read_json(
    path: Path, *, what: str = "a result", fix: str = RESTORE, sealed: bool = False
) -> dict[str, Any]:
    """An object of a file, which may come from anybody; see `parse_json`.

    Args:
        path: Of the file.
        what: It is, for errors: "a result".
        fix: What to do next where it cannot be read.
        sealed: It must have a `seal`; otherwise one that is there is compared.

    Raises:
        FormatError: Unreadable, no file, no JSON, no object, or not what was sealed.
    """
    try:
        content = _parse_json(read_bytes(path, JSON_BYTES), sealed)
    except (OSError, ValueError) as error:
        found = getattr(error, "strerror", None) or str(error)
        raise _unreadable(what, str(path), f"{type(error).__name__}: {found}", fix) from None
    if not isinstance(content, dict):
        raise FormatError(
            f"not {what}", where=str(path), found=f"a {type(content).__name__}", fix=fix
        )
    return content


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """An object with the sha256 of itself in it, so that a change of any value is noticed.

    No secret is in it: it tells what was damaged or edited, not who wrote it.
    """
    plain = _as_json(content)
    plain.pop(SEAL, None)
    return {**plain, SEAL: digest_of_json(plain)}


def digest_of_json(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _as_json(content: Any) -> Any:
    """As a reader of the file will see it: tuples are lists, and so on."""
    return json.loads(json.dumps(content, default=str), parse_constant=lambda word: None)


def _unreadable(what: str, where: str, found: str, fix: str) -> FormatError:
    return FormatError(f"{what} cannot be read", where=where, found=found[:300], fix=fix)


def _parse_json(text: str | bytes, sealed: bool = False) -> Any:
    if isinstance(text, bytes):
        # A mark in front is what some editors leave.
        text = text.decode("utf-8-sig")
    if len(text) > JSON_BYTES or sum(map(text.count, ",[{")) > JSON_VALUES:
        raise ValueError(f"more than {JSON_BYTES:,} bytes or {JSON_VALUES:,} values")
    try:
        content = json.loads(text, object_pairs_hook=_without_doubles, parse_constant=_refuse_word)
    except RecursionError:
        raise ValueError("lists or objects too deep inside of each other") from None
    _check_values(content)
    has_seal = isinstance(content, dict) and (sealed or SEAL in content)
    if has_seal and content.pop(SEAL, None) != digest_of_json(content):
        raise ValueError("its contents do not match their sha256")
    return content


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:40]!a} stands twice in one object")
    return made


def _refuse_word(word: str) -> None:
    raise ValueError(f"{word} is not a number of JSON")


def _check_values(content: Any) -> None:
    """Refuse depth and values that Python reads and others do not."""
    level = [content]
    for _ in range(JSON_DEPTH):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value
                inner += value.values()
            elif isinstance(value, list):
                inner += value
            elif isinstance(value, str):
                # Half of a surrogate pair can be neither written nor printed: encoding refuses it.
                value.encode()
            elif isinstance(value, float) and not math.isfinite(value):
                raise ValueError("a number that is not finite")
            elif isinstance(value, int) and not -_WHOLE <= value < _WHOLE:
                raise ValueError("a whole number of more than 64 bits")
        level = inner
        if not level:
            return
    raise ValueError(f"lists or objects more than {JSON_DEPTH} deep inside of each other")


_NUMBERS: dict[Any, Any] = {int: Integral, float: Real}
"""Of numpy as well, where a task in memory is copied by its spec."""


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type: a plain one, one of several, a literal, a list or a mapping.

    A boolean is no whole number here, a whole number may stand for a fraction, and NaN for none.
    Of a class other than these it must be an instance; what a hint says beyond that is not looked at.
    """
    origin = get_origin(hint)
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in get_args(hint))
    if origin in (Union, UnionType):
        return any(fits(value, each) for each in get_args(hint))
    if origin in (tuple, list, Sequence):
        inner = next(iter(get_args(hint)), Any)
        return isinstance(value, list | tuple) and all(fits(each, inner) for each in value)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping)
    if not isinstance(hint, type):
        return True
    if hint in _NUMBERS:
        number = isinstance(value, _NUMBERS[hint]) and not isinstance(value, bool)
        return number and math.isfinite(value)
    return isinstance(value, hint)


def hints_of(function: Any) -> dict[str, Any]:
    """The types that a function or a dataclass says; of a stranger's that cannot be read, none."""
    try:
        return get_type_hints(function)
    except (NameError, TypeError, AttributeError):
        # Imported for type checkers alone, or written for a later Python.
        return {}


def sha256_of_file(file: Path) -> str:
    """sha256 of a file's bytes, 64 hexadecimal digits; about 1 s a gigabyte, and no memory.

    Raises:
        OSError: It cannot be read, or is no file; see `open_plain`.
    """
    digest = hashlib.sha256()
    with open_plain(file) as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def digest_file(file: Path) -> str:
    """As `sha256_of_file`, but a file that did not change is read once a process.

    Sets of weights of one architecture have one size, as images of one camera may, and files of
    one archive often one time; a copy that keeps its time still has a new change time or another
    inode. All of these are compared, and a file that was just written is not remembered.

    Raises:
        OSError: It cannot be read.

    Cost: about 1 s a gigabyte, once.
    """
    state = file_state(file)
    known = known_digest(file, state)
    if known is not None:
        return known
    digest = sha256_of_file(file)
    # Written meanwhile: what was read belongs to neither state.
    if state is not None and file_state(file) == state:
        remember_digest(file, state, digest)
    return digest


def file_state(file: Path) -> FileState | None:
    """What changes whenever a file does; None where a change might leave it as it is.

    Raises:
        OSError: There is no such file.
    """
    about = file.stat()
    # Windows has no change time: contents written in place, their time put back, would not show.
    if os.name == "nt" or time.time() - max(about.st_mtime, about.st_ctime) < SETTLED:
        return None
    return about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns


def known_digest(file: Path, state: FileState | None) -> str | None:
    """The digest of a file in this state, if it is remembered."""
    known = _digests.get(os.path.abspath(file))
    return known[1] if state is not None and known is not None and known[0] == state else None


def remember_digest(file: Path, state: FileState, digest: str) -> None:
    """Remember it for this process."""
    if len(_digests) >= REMEMBERED:
        _digests.clear()
    _digests[os.path.abspath(file)] = state, digest


def cache_root() -> Path:
    """`$RESTUNING_CACHE`, else `~/.cache/restuning/features`: what may be deleted at any time."""
    chosen = os.environ.get("RESTUNING_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "restuning" / "features"


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
        raise TrainingError(what, where=str(folder), found="; ".join(told)[:LONGEST_TOLD], fix=fix)


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

    def __init__(self, release: Callable[[], object] | None) -> None:
        self._release = release

    @classmethod
    def take(cls, path: Path, *, wait: bool) -> Claim | None:
        """Claim a file, or None if another process has it and we do not wait.

        Args:
            path: The lock file; its folder is made. What is in it stays, and no link is followed.
            wait: Until it is free.

        Raises:
            FormatError: Something else than a file lies there, or its folder cannot be made.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            there = os.lstat(path).st_mode if os.path.lexists(path) else stat.S_IFREG
            _refuse_special(there)
        except OSError as error:
            raise _no_lock(path, error) from None
        try:
            release = _lock(path, wait)
        except (OSError, NotImplementedError) as error:
            # The place of a link that was put there just now.
            if getattr(error, "errno", None) in (errno.ELOOP, errno.EINVAL):
                raise _no_lock(path, error) from None
            # A file system without locks: work is done twice at worst, for every result is whole.
            return cls(None)
        return None if release is None else cls(release)

    @classmethod
    def of_folder(cls, folder: Path) -> Claim:
        """Wait for a folder that is there; nothing is left in it or beside it.

        Raises:
            OSError: It is not there.
        """
        if os.name == "nt":
            # Folders cannot be locked there: a file of the machine stands for it.
            name = hashlib.sha256(str(folder.resolve()).lower().encode()).hexdigest()
            place = Path(tempfile.gettempdir()) / f"restuning-{name[:32]}.lock"
            return cls.take(place, wait=True) or cls(None)
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            # A file system without locks, as in `take`.
            os.close(descriptor)
            return cls(None)
        return cls(lambda: _unlock(descriptor))

    def give_back(self) -> None:
        """Let others have it."""
        release, self._release = self._release, None
        if release is not None:
            release()

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *error: object) -> None:
        self.give_back()


LOCK = ".lock"
ORPHANS = 30.0
"""Seconds after which the last loader process of one that was killed has noticed (torch's look every 5)."""

_held: set[tuple[str, int]] = set()
"""Folders, each with the thread that holds it."""


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Inside, this process alone writes to a folder; a lock in it is gone afterwards.

    The system gives it back when the process dies. Of the processes of a launcher, which write one
    folder together, the main one holds it. May be held again by who holds it.

    Args:
        folder: Made, and removed again where nothing was put into it.

    Raises:
        TrainingError: Another process works there, or it cannot be made.
    """
    key = os.path.realpath(folder), threading.get_ident()
    if key in _held or not is_main_process():
        yield
        return
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    lock = folder / LOCK
    claim = _claim_patiently(lock)
    _held.add(key)
    try:
        with suppress(OSError):
            lock.write_text(f"{_machine} {os.getpid()}")
        yield
    finally:
        _held.discard(key)
        # Before it is given back: whoever waits for it then makes a new one.
        with suppress(OSError):
            lock.unlink()
        claim.give_back()
        if os.name == "nt":
            # There a file that is open cannot be removed, nor taken from who has opened it since.
            with suppress(OSError):
                lock.unlink()
        # Those that are not empty stay.
        with suppress(OSError):
            for each in missing:
                each.rmdir()


def _claim_patiently(lock: Path) -> Claim:
    """Claim a lock, also one whose owner was killed and left loader processes behind."""
    end = time.monotonic() + ORPHANS
    while True:
        try:
            claim = Claim.take(lock, wait=False)
        except FormatError as error:
            raise TrainingError(
                "the folder of a run cannot be written",
                where=str(lock.parent),
                found=f"{error.what}: {error.found}",
                fix=error.fix,
            ) from None
        if claim is not None:
            return claim
        told = ""
        with suppress(OSError, UnicodeDecodeError):
            told = lock.read_text()
        machine, _, number = told.partition(" ")
        killed = machine == _machine and number.isdigit() and not _alive(int(number))
        if not killed or time.monotonic() > end:
            raise TrainingError(
                "another process works in this folder",
                where=str(lock.parent),
                found=f"process {number} of {machine}" if number else "",
                fix="wait until it has ended, or give another --out",
            )
        time.sleep(0.2)


def _no_lock(path: Path, error: Exception) -> FormatError:
    return FormatError(
        "a lock cannot be made",
        where=str(path),
        found=getattr(error, "strerror", None) or str(error),
        fix="look at what lies there and remove it, or choose another folder",
    )


def _lock(path: Path, wait: bool) -> Callable[[], object] | None:
    """Lock a file; what gives it back, or None where another has it."""
    if os.name == "nt":
        # No links there that an unprivileged user can make.
        from filelock import FileLock, Timeout

        lock = FileLock(path, timeout=-1 if wait else 0)
        try:
            lock.acquire()
        except Timeout:
            return None
        return lock.release
    import fcntl

    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o666)
        try:
            _refuse_special(os.fstat(descriptor).st_mode)
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # Whoever had it may have removed the file: then others lock a new one of that name.
            if _is_at(descriptor, path):
                return lambda: _unlock(descriptor)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _unlock(descriptor: int) -> None:
    import fcntl

    # Closing alone would leave it with processes that were forked meanwhile.
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False
