"""The folder of a search: a description that all calls on it must agree with, and results in files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from restuning._errors import FormatError, TrainingError
from restuning._files import read_json, refuse_other, write_json

OF = "of search"
"""Name under which a result holds the digest of the description it was made under."""


def _forget(folder: Path, description: Path) -> None:
    """Remove the folder of a search, and no other."""
    if not description.is_file() and any(folder.iterdir()):
        raise TrainingError(
            "a folder that is to be started over was not left by a search",
            where=str(folder),
            found=f"no {description.name}",
            fix="choose another --out",
        )
    # Of a link, what it points to would be emptied.
    if folder.is_symlink():
        raise TrainingError(
            "a folder that is to be started over is a link",
            where=str(folder),
            fix="choose another --out",
        )
    shutil.rmtree(folder, ignore_errors=True)


class SearchFolder:
    """Results in files, each whole or not there, so that a killed search goes on and ends the same.

    Args:
        folder: Folder of the search.
        identity: The values that must agree between all calls on the folder, as JSON.
        file: Name of the file that holds them.
        what: The error where it does not agree, such as "this folder holds another sweep".
        resume: False forgets what the folder holds; None where nothing can be forgotten.

    Raises:
        TrainingError: The folder was begun under another identity, or is to be forgotten and is no
            folder of a search.
        FormatError: What it holds is damaged, or it cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        *,
        file: str,
        what: str,
        resume: bool | None = None,
    ) -> None:
        self.folder = folder
        path = folder / file
        if resume is False and folder.exists():
            _forget(folder, path)
        # As it will be read again: tuples are lists, and what JSON does not know is a text.
        now = json.loads(json.dumps(identity, default=str))
        self._of = hashlib.sha256(json.dumps(now, sort_keys=True).encode()).hexdigest()[:16]
        if not os.path.lexists(path):
            write_json(path, now, sealed=True)
            return
        again = "" if resume is None else ", or --no-resume to start over"
        fix = f"use what was used then, or another --out{again}"
        # Both through JSON, so that what differs is what a reader of the file would see.
        before = read_json(path)
        if unknown := [name for name in now if name.startswith("the ") and name not in before]:
            raise TrainingError(
                f"{what}, or of other data: it does not say what it was made of",
                where=str(folder),
                found=f"nothing of {', '.join(unknown)}: an earlier version did not write them down",
                fix=fix,
            )
        refuse_other(before, now, folder, what=what, fix=fix)

    def path(self, *parts: str) -> Path:
        """The file of the result of that name."""
        return self.folder.joinpath(*parts[:-1], f"{parts[-1]}.json")

    def has(self, *parts: str) -> bool:
        """Whether there is such a result."""
        return self.path(*parts).exists()

    def read(self, *parts: str) -> dict[str, Any]:
        """A result.

        Raises:
            FormatError: There is none, it is damaged, or it was made by another search.
        """
        path = self.path(*parts)
        content = read_json(path)
        if OF in content:
            # Who writes the mark seals as well: without a seal it was taken off.
            read_json(path, sealed=True)
        # Those of before there was such a mark have none.
        if content.pop(OF, self._of) != self._of:
            raise FormatError(
                "a result is of another search",
                where=str(path),
                found=f"it does not belong to what {self.folder} was begun with",
                fix="delete it and run the same command again",
            )
        return content

    def write(self, content: Mapping[str, Any], *parts: str) -> None:
        """Leave a result, whole or not at all.

        Raises:
            FormatError: It cannot be written.
        """
        write_json(self.path(*parts), {**content, OF: self._of}, sealed=True)
