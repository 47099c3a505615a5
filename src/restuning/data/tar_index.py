"""What is in one tar and where: made in one pass over its bytes, and kept for the next process.

Members are grouped as webdataset does: what stands before the first dot of a member's name is the key of a sample, and
its members stand together. Nothing is unpacked, and a name is never a path: it is compared and shown.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

from restuning._errors import DataError
from restuning.backbones.images import image_suffixes
from restuning.data.kept import keep_index
from restuning.data.listing import LITTER
from restuning.data.remote import File

KEPT = "tars"
"""Folder of indexes, in `cache_root`: a file a tar. It may be deleted."""

LABELS = ("cls", "json", "txt")
"""Endings of members that may hold a label."""

LONGEST_LABEL = 2**20
"""Bytes of such a member: JSON beside an image, or a caption."""

BLOCK = 512
"""Bytes that a tar is made of."""

PIECE = 2**20
"""Bytes of a member that are digested at once."""

APART = "write the members of a sample one after the other, under a key of its own"


@dataclass(frozen=True)
class Sample:
    """One sample of a tar.

    Attributes:
        key: Of the sample: its members' names up to the first dot, folders included.
        image: Ending of the member that is its image; "" where it has none.
        start, size: Of the image, in bytes of the tar.
        sha256: Of the image's bytes.
        labels: Texts of the members that may hold its label, by ending.
    """

    key: str
    image: str
    start: int
    size: int
    sha256: str
    labels: dict[str, str]


@dataclass(frozen=True)
class TarIndex:
    """Samples of a tar in their order.

    Attributes:
        state: Of the file when it was read (`File.state`).
        samples: In order.
    """

    state: list[Any]
    samples: list[Sample]


def index_tar(file: File) -> TarIndex:
    """The index of a tar: a kept one where the tar did not change since, else by reading it.

    Raises:
        DataError: It cannot be read, is no tar or is damaged; or a key stands twice, or a sample has two images.

    Cost: of a tar that nobody has read, a pass over its bytes, about 1 s a gigabyte; else a `stat`.
    """
    # What is an image hangs on what is installed: of HEIC one that was made without its library says nothing.
    suffixes = ",".join(sorted(image_suffixes()))
    return keep_index(
        file,
        KEPT,
        suffixes,
        lambda state: file.through(lambda stream: _read(file, state, stream)),
        lambda index: {
            "samples": [list(asdict(each).values()) for each in index.samples],
        },
        lambda content, state: TarIndex(state, [Sample(*row) for row in content["samples"]]),
    )


def _read(file: File, state: list[Any], stream: BinaryIO) -> TarIndex:
    samples: list[Sample] = []
    seen: set[str] = set()
    for key, members in _by_key(_members(file, stream)):
        if key in seen:
            raise _damaged(file, "a key stands twice in a tar", key, APART)
        seen.add(key)
        sample = _sample(file, stream, key, members)
        if sample is not None:
            samples.append(sample)
    return TarIndex(state, samples)


def _by_key(
    members: Iterator[tuple[str, tarfile.TarInfo]],
) -> Iterator[tuple[str, list[tuple[str, tarfile.TarInfo]]]]:
    """Members that stand together under one key, with their endings."""
    key, group = "", []
    for name, member in members:
        folder, _, last = name.rpartition("/")
        stem, _, ending = last.partition(".")
        own = f"{folder}/{stem}" if folder else stem
        if own != key and group:
            yield key, group
            group = []
        key = own
        group.append((ending.lower(), member))
    if group:
        yield key, group


def _members(file: File, stream: BinaryIO) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """Files of a tar with their names; what is no file is passed over, as are files that systems leave.

    tarfile takes a damaged header for the end: the end is looked at here.
    """
    name = ""
    try:
        with tarfile.open(fileobj=stream, mode="r:", errorlevel=2) as tar:
            while (member := tar.next()) is not None:
                name = member.name.removeprefix("./")
                last = name.rpartition("/")[2]
                if member.islnk() or member.issym() or member.issparse():
                    raise _damaged(
                        file,
                        "a member of a tar is a link, or full of holes",
                        name,
                        "write its bytes as they are: tar --dereference --hard-dereference",
                    )
                if not _is_text(name):
                    raise _damaged(file, "a member's name is no text", ascii(name), "rename it")
                if member.isreg() and not last.startswith(".") and last.lower() not in LITTER:
                    yield name, member
                # It would keep all that it has read.
                tar.members = []  # type: ignore[attr-defined]
            _check_end(file, stream, tar.offset, name)
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise _damaged(
            file, "a tar cannot be read", name, "write it again, uncompressed", str(error)
        ) from None


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in name


def _check_end(file: File, stream: BinaryIO, offset: int, name: str) -> None:
    """Refuse a tar that does not end as one does: it was cut off, or there is more behind its end."""
    stream.seek(offset)
    first = stream.read(BLOCK)
    if len(first) < BLOCK or any(first):
        raise _damaged(
            file,
            "a tar is cut off or damaged",
            name,
            "copy it again, or write it again",
            f"no end of a tar at byte {offset:,}",
        )
    while piece := stream.read(PIECE):
        if piece.strip(b"\0"):
            raise _damaged(
                file,
                "there is more behind the end of a tar",
                name,
                "write one tar of all, or name each by itself",
            )


def _sample(
    file: File, stream: BinaryIO, key: str, members: Sequence[tuple[str, tarfile.TarInfo]]
) -> Sample | None:
    """A sample of its members; None where all of them are neither images nor labels."""
    labels: dict[str, str] = {}
    image: tuple[str, tarfile.TarInfo] | None = None
    endings = [ending for ending, _ in members]
    if len(set(endings)) < len(endings):
        raise _damaged(file, "a key stands twice in a tar", key, APART)
    for ending, member in members:
        if ending in LABELS:
            labels[ending] = _text(file, stream, key, ending, member)
        elif f".{ending}" not in image_suffixes():
            continue
        elif image is not None:
            raise _damaged(
                file,
                "a sample has two images",
                f"{key}, .{image[0]} and .{ending}",
                "leave one, or give each a key of its own",
            )
        else:
            image = ending, member
    if image is None:
        return Sample(key, "", 0, 0, "", labels) if labels else None
    ending, member = image
    digest = hashlib.sha256()
    for piece in _pieces(file, stream, key, member):
        digest.update(piece)
    return Sample(key, ending, member.offset_data, member.size, digest.hexdigest(), labels)


def _text(file: File, stream: BinaryIO, key: str, ending: str, member: tarfile.TarInfo) -> str:
    if member.size > LONGEST_LABEL:
        raise _damaged(
            file,
            "a label is too long",
            f"{key}.{ending}",
            "leave it out of the tar",
            f"{member.size:,} bytes",
        )
    try:
        return b"".join(_pieces(file, stream, key, member)).decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise _damaged(file, "a label is no text", f"{key}.{ending}", "write it as UTF-8") from None


def _pieces(file: File, stream: BinaryIO, key: str, member: tarfile.TarInfo) -> Iterator[bytes]:
    stream.seek(member.offset_data)
    left = member.size
    while left:
        piece = stream.read(min(left, PIECE))
        if not piece:
            raise _damaged(
                file,
                "a tar is cut off or damaged",
                key,
                "copy it again, or write it again",
                f"{left:,} bytes of {member.name!a} are missing",
            )
        yield piece
        left -= len(piece)


def _damaged(file: File, what: str, key: str, fix: str, found: str = "") -> DataError:
    where = f"{file}, {key}" if key else str(file)
    return DataError(what, where=where, found=found[:200], fix=fix)


_NUMBER = re.compile(r"\d{1,9}", re.ASCII)


def read_label(labels: dict[str, str], source: str, field: str) -> int | str | None:
    """A label as a tar has it: a class number, or the name of a class; None where there is none.

    Args:
        labels: Texts of a sample's members.
        source: Which of `LABELS` holds it.
        field: Of JSON.

    Raises:
        ValueError: It is neither; its words say what it is.
    """
    text = labels.get(source)
    if text is None or not text:
        return None
    if source == "txt":
        return text
    if source == "cls":
        return int(text) if _NUMBER.fullmatch(text) else text
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("lists or objects too deep inside of each other") from None
    if not isinstance(content, dict):
        raise ValueError(f"{type(content).__name__} in place of fields by name")
    value = content.get(field)
    if value is None or value == "":
        return None
    if type(value) is int or isinstance(value, str):
        return value.strip() or None if isinstance(value, str) else value
    raise ValueError(f"{field} is {str(value)[:60]!r}, neither a number of a class nor its name")
