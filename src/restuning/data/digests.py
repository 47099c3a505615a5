"""Digests of many files, remembered from process to process, and of values in memory."""

from __future__ import annotations

import enum
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import is_dataclass
from pathlib import Path
from types import CellType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from restuning._errors import DataError
from restuning._files import (
    Claim,
    FileState,
    cache_root,
    digest_file,
    file_state,
    known_digest,
    remember_digest,
    write_bytes,
)
from restuning.backbones.images import read_image

Tell = Callable[[str], None]
"""Receives a line about work that takes long."""

THREADS = 4
"""Files that are read at once: more gain nothing on one disk."""

WORTH_KEEPING = 32 * 2**20
"""Bytes from which digests are written down for the next process; fewer are read as fast again."""

LONG = 2**30
"""Bytes from which a line is said before they are read."""

MEMO = "digests"
"""Folder of what is remembered, in `cache_root`: a file for each folder of files. It may be deleted."""

FORMAT = 1
LARGEST_MEMO = 2**30

DEEPEST = 24
"""Of objects in objects; what lies deeper is known by its kind alone."""


def quiet(line: str) -> None:
    """Hear nothing."""


def digest_files(files: Sequence[Path], tell: Tell = quiet) -> list[str | None]:
    """sha256 of files, 64 hexadecimal digits each; None of one that cannot be read.

    A file that did not change since it was read, in this process or an earlier one, is not read
    again: its path, inode, size, and times of writing and of change in nanoseconds are compared. One
    that changed within the last seconds is always read.

    Args:
        files: Any number, in any order.
        tell: Receives a line where much has to be read.

    Cost: a `stat` a file, about 1 s for 100,000; of those that are new, 1 s a gigabyte.
    """
    states = [_state(file) for file in files]
    digests = [known_digest(file, state) for file, state in zip(files, states, strict=True)]
    if None in digests:
        memo = _Memo.of(files)
        memo.recall(files, states, digests)
        unread = _unknown(digests)
        size = sum(_size(files[n]) for n in unread)
        if size >= LONG:
            tell(f"reading {len(unread):,} files, {size / 2**30:.1f} GiB, to know their contents")
        with ThreadPoolExecutor(THREADS) as pool:
            for n, digest in zip(
                unread, pool.map(_digest, (files[n] for n in unread)), strict=True
            ):
                digests[n] = digest
        if size >= WORTH_KEEPING:
            memo.keep(files, states, digests)
    return digests


def _state(file: Path) -> FileState | None:
    """As `file_state`; also None of a file that is not there."""
    try:
        return file_state(file)
    except OSError:
        return None


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _unknown(digests: Sequence[str | None]) -> list[int]:
    return [n for n, digest in enumerate(digests) if digest is None]


def _digest(file: Path) -> str | None:
    try:
        return digest_file(file)
    except OSError:
        return None


class _Memo:
    """Digests of the files of a folder as an earlier process left them.

    Args:
        folder: In which all of the files lie.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        name = hashlib.sha256(folder.encode(errors="surrogateescape")).hexdigest()[:24]
        self.file = cache_root() / MEMO / f"{name}.json"

    @classmethod
    def of(cls, files: Sequence[Path]) -> _Memo:
        parents = {os.path.dirname(os.path.abspath(file)) for file in files}
        try:
            return cls(os.path.commonpath(parents))
        except ValueError:  # On several drives.
            return cls(min(parents))

    def recall(
        self,
        files: Sequence[Path],
        states: Sequence[FileState | None],
        digests: list[str | None],
    ) -> None:
        """Fill in the digests of files that are as they were."""
        known = self._read()
        if not known:
            return
        for n in _unknown(digests):
            entry = known.get(self._name(files[n]))
            if entry is not None and entry[0] == states[n]:
                digests[n] = entry[1]
                remember_digest(files[n], *entry)

    def keep(
        self,
        files: Sequence[Path],
        states: Sequence[FileState | None],
        digests: Sequence[str | None],
    ) -> None:
        """Write down the digests of files that have settled; without a place to, nothing."""
        now: dict[str, tuple[FileState, str]] = {}
        for file, state, digest in zip(files, states, digests, strict=True):
            # Not what was read while it was written: this process does not remember that either.
            if state is not None and digest is not None and known_digest(file, state) == digest:
                now[self._name(file)] = state, digest
        if not now:
            return
        with suppress(OSError):
            # Who finds another at it lets it be: the file only saves reading.
            claim = Claim.take(self.file.with_suffix(".lock"), wait=False)
            if claim is None:
                return
            with claim:
                before = self._read()
                # Lists of one folder are kept together; files that have long gone are not.
                kept = {**before, **now} if len(before) <= 2 * len(now) + 10_000 else now
                rows = {name: [*state, digest] for name, (state, digest) in kept.items()}
                content = {"format": FORMAT, "folder": self.folder, "files": rows}
                write_bytes(self.file, json.dumps(content, separators=(",", ":")).encode())

    def _name(self, file: Path) -> str:
        return os.path.relpath(os.path.abspath(file), self.folder)

    def _read(self) -> dict[str, tuple[FileState, str]]:
        """What is remembered; of a file that is not what we wrote, nothing."""
        try:
            if self.file.stat().st_size > LARGEST_MEMO:
                return {}
            content = json.loads(self.file.read_bytes())
            if content["format"] != FORMAT or content["folder"] != self.folder:
                return {}
            return {name: _entry(row) for name, row in content["files"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return {}


_DIGEST = re.compile("[0-9a-f]{64}")


def _entry(row: Any) -> tuple[FileState, str]:
    inode, size, written, changed, digest = row
    numbers = (inode, size, written, changed)
    if not all(type(n) is int for n in numbers) or not _DIGEST.fullmatch(digest):
        raise ValueError(str(row)[:200])
    return numbers, digest


def digest_value(value: Any) -> bytes:
    """32 bytes that tell a value from others: tensors, arrays, images, texts, numbers, and what holds them.

    Equal values have equal digests in every process. An object of a kind that is not known here is
    known by its attributes, one without any by its class, a path by the contents of its file.
    """
    reading = _Reading()
    reading.take(value, 0)
    return reading.digest.digest()


class _Reading:
    """One pass over a value."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        # Objects may hold each other. They are kept here, so that no other takes an id meanwhile.
        self.met: dict[int, tuple[int, Any]] = {}

    def note(self, kind: str, *parts: bytes) -> None:
        self.digest.update(kind.encode(errors="surrogatepass"))
        for part in parts:
            # With its length in front, or `ab` + `c` would be `a` + `bc`.
            self.digest.update(len(part).to_bytes(8, "little"))
            self.digest.update(part)

    def take(self, value: Any, depth: int) -> None:
        if isinstance(value, str):
            self.note("text;", value.encode(errors="surrogatepass"))
        elif value is None or isinstance(value, (bool, int, float, complex)):
            self.note(f"{type(value).__name__};", repr(value).encode())
        elif isinstance(value, (bytes, bytearray, memoryview)):
            self.note("bytes;", bytes(value))
        elif isinstance(value, Tensor):
            self.take_tensor(value)
        elif isinstance(value, np.generic):
            self.note("number;", value.dtype.str.encode(), value.tobytes())
        elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
            kind = f"array {value.dtype.str} {value.shape};"
            self.note(kind, np.ascontiguousarray(value).tobytes())
        elif isinstance(value, Image.Image):
            self.take_image(value)
        elif isinstance(value, os.PathLike):
            path = Path(os.fspath(value))
            self.note("file;", (_digest(path) or str(value)).encode(errors="surrogateescape"))
        elif isinstance(value, (enum.Enum, type)):
            self.note("name;", str(value).encode())
        else:
            self.take_many(value, depth)

    def take_many(self, value: Any, depth: int) -> None:
        """What holds other values."""
        kind, parts = _take_apart(value)
        self.note(f"{kind} {len(parts)};")
        if not isinstance(value, (Mapping, list, tuple)):
            if id(value) in self.met:
                self.note(f"again {self.met[id(value)][0]};")
                return
            self.met[id(value)] = len(self.met), value
        if depth < DEEPEST:
            for part in parts:
                self.take(part, depth + 1)

    def take_tensor(self, value: Tensor) -> None:
        value = value.detach()
        if value.layout != torch.strided:
            value = value.to_dense()
        if value.is_quantized:
            scale = repr((value.dtype, value.q_scale(), value.q_zero_point()))
            self.note("quantised;", scale.encode())
            value = value.int_repr()
        # As bytes: numpy has no bfloat16.
        whole = value.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        raw = whole.view(torch.uint8).numpy().tobytes() if whole.numel() else b""
        self.note(f"tensor {value.dtype} {tuple(value.shape)};", raw)

    def take_image(self, value: Image.Image) -> None:
        # First as it is read: that decodes a file in its own way, and whatever colours are made of
        # (alpha of a palette, which end is white, which way up) is in it.
        try:
            made = read_image(value)
            size, read = made.size, made.tobytes()
        except DataError:
            size, read = None, b""
        raw = value.tobytes()
        palette = value.getpalette(None) if value.mode in ("P", "PA") else None
        about = (value.mode, value.size, palette, value.info.get("transparency"), size)
        self.note("image;", repr(about).encode(), raw, *([] if read == raw else [read]))


def _take_apart(value: Any) -> tuple[str, list[Any]]:
    """The kind of what holds other values, and those."""
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, Mapping):
        pairs = sorted(value.items(), key=lambda pair: repr(pair[0]))
        return "mapping", [part for pair in pairs for part in pair]
    if isinstance(value, (list, tuple)):
        return "sequence", list(value)
    if isinstance(value, (set, frozenset)):
        return "set", sorted(digest_value(each) for each in value)
    if isinstance(value, np.ndarray):
        return "array", [list(value.shape), *value.ravel().tolist()]
    if isinstance(value, functools.partial):
        return "partial", [value.func, value.args, value.keywords]
    if isinstance(value, MethodType):
        return f"method {value.__name__}", [value.__self__]
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        return f"function {value.__module__}.{value.__qualname__}", cells
    # As it is written down, where it can be: a field that is new and unused changes nothing.
    to_dict = getattr(value, "to_dict", None)
    if is_dataclass(value) and callable(to_dict):
        return kind, [to_dict()]
    return kind, [dict(vars(value))] if hasattr(value, "__dict__") else []


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # A name that a function was to be given later.
        return False
