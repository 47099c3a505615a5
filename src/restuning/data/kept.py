"""What was found in a large file by reading all of it, kept for the next process while the file is what it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from restuning._errors import DataError
from restuning._files import cache_root, digest_of_json, read_bytes, write_bytes
from restuning.data.remote import File

FORMAT = 1

LARGEST = 2**30
"""Bytes of a kept index that is read."""

T = TypeVar("T")


def keep_index(
    file: File,
    folder: str,
    about: str,
    make: Callable[[list[Any]], T],
    to_json: Callable[[T], Mapping[str, Any]],
    from_json: Callable[[Mapping[str, Any], list[Any]], T],
) -> T:
    """The index of a file: a kept one where the file did not change since, else made and kept.

    Args:
        file: That is indexed.
        folder: In `cache_root`; a file an index, which may be deleted.
        about: What of the file is indexed; "" for all.
        make: Makes it, of the file's state.
        to_json: As plain values; none is called "format", "file", "about", "state" or "sha256".
        from_json: Back; raises ValueError, KeyError or TypeError of what it did not write.

    Raises:
        DataError: The file changed meanwhile; and whatever `make` raises.
    """
    state = file.state()
    settled = file.known_state()
    name = f"{file.name}\0{about}" if about else file.name
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:24]
    place = cache_root() / folder / f"{digest}.json"
    head = {"format": FORMAT, "file": str(file), "about": about, "state": state}
    if settled is not None:
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            content = json.loads(read_bytes(place, LARGEST))
            told = content.pop("sha256")
            if all(content[key] == value for key, value in head.items()) and (
                told == digest_of_json(content)
            ):
                return from_json(content, state)
    index = make(state)
    if file.state() != state:
        raise DataError(
            "a file changed while it was read",
            where=str(file),
            fix="let nothing write to it, and run the same command again",
        )
    if settled is not None:
        # Without a place to keep it, it is made again.
        with suppress(OSError):
            content = {**head, **to_json(index)}
            # The seal of others refuses as much as this may hold.
            content["sha256"] = digest_of_json(content)
            write_bytes(place, json.dumps(content, separators=(",", ":")).encode())
    return index
