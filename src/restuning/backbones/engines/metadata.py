"""The description of an engine, read out of its file without opening the network in it."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import BinaryIO

from restuning._errors import FormatError
from restuning.backbones.engines.description import KEY

LARGEST = 16 * 2**20
"""Bytes of a description: a network of 1000 layers has one of about 0.5 MiB."""

_GRAPH_ENTRIES = 10_000
"""Entries at the top of an ONNX file that are looked at; exporters write some ten."""

# Fields of ONNX's ModelProto and of an entry of its metadata, and kinds of protobuf values.
_METADATA, _ENTRY_KEY, _ENTRY_VALUE = 14, 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def read_archive_text(file: Path) -> str:
    """The description in a `torch.export` program, by its entry in the archive; "" for none.

    Nothing is unpickled.

    Raises:
        FormatError: It is no archive, or the entry is too large.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            # torch puts everything below a folder of the archive's own name.
            entries = [
                each
                for each in archive.infolist()
                if each.filename.rpartition("/")[2] == f"{KEY}.json"
                and "extra" in each.filename.rpartition("/")[0]
            ]
            if not entries:
                return ""
            _refuse_large(file, entries[0].file_size)
            with archive.open(entries[0]) as opened:
                # What the entry says of its size may be wrong.
                text = opened.read(LARGEST + 1)
    except (OSError, zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError) as error:
        raise _malformed(file, f"{type(error).__name__}: {error}") from None
    _refuse_large(file, len(text))
    return _decode(file, text)


def read_onnx_text(file: Path) -> str:
    """The description in an ONNX file, by walking the fields at its top; "" for none.

    The graph is passed over: nothing of it is read or allocated.

    Raises:
        FormatError: It is no ONNX file, or the description is too large.
    """
    try:
        with file.open("rb") as stream:
            end = os.fstat(stream.fileno()).st_size
            for _ in range(_GRAPH_ENTRIES):
                if stream.tell() >= end:
                    return ""
                field, size = _read_field(stream, end)
                if field != _METADATA:
                    stream.seek(size, os.SEEK_CUR)
                    continue
                _refuse_large(file, size)
                key, value = _read_pair(stream, stream.tell() + size)
                if key == KEY.encode():
                    return _decode(file, value)
    except (OSError, ValueError) as error:
        raise _malformed(file, f"{type(error).__name__}: {error}") from None
    raise _malformed(file, f"more than {_GRAPH_ENTRIES} entries before its description")


def _read_pair(stream: BinaryIO, end: int) -> tuple[bytes, bytes]:
    """Key and value of an entry of metadata."""
    found = {_ENTRY_KEY: b"", _ENTRY_VALUE: b""}
    while stream.tell() < end:
        field, size = _read_field(stream, end)
        content = stream.read(size)
        if field in found:
            found[field] = content
    return found[_ENTRY_KEY], found[_ENTRY_VALUE]


def _read_field(stream: BinaryIO, end: int) -> tuple[int, int]:
    """The number of the next field, and how many bytes of it follow."""
    tag = _read_varint(stream)
    field, kind = tag >> 3, tag & 7
    if kind == _VARINT:
        _read_varint(stream)
        return field, 0
    sizes = {_FIXED64: 8, _FIXED32: 4}
    size = _read_varint(stream) if kind == _BYTES else sizes.get(kind)
    if size is None or stream.tell() + size > end:
        raise ValueError("a field that is longer than what holds it")
    return field, size


def _read_varint(stream: BinaryIO) -> int:
    value = 0
    # Ten groups of seven bits hold 64.
    for shift in range(0, 70, 7):
        byte = stream.read(1)
        if not byte:
            raise ValueError("it ends in the middle of a number")
        value |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return value
    raise ValueError("a number without an end")


def _decode(file: Path, text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise _malformed(file, str(error)) from None


def _refuse_large(file: Path, size: int) -> None:
    if size > LARGEST:
        raise _malformed(file, f"a description of {size:,} bytes, at most {LARGEST:,} are read")


def _malformed(file: Path, found: str) -> FormatError:
    return FormatError(
        "not an engine of ours, or a damaged one",
        where=str(file),
        found=found[:200],
        fix="export it again with `restuning engine export`, or fetch the file again",
    )
