"""The three files of a task, replaced together: at every moment the old task is whole or the new one is.

`task.json` tells the sha256 of the weights, and so which weights are its own. New weights are first put
beside the old ones under a name made of their sha256; then `task.json` is exchanged, which is one step;
then they take their usual name. Who reads in between finds the weights by their sha256 under either name.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from restuning._errors import FormatError, warn
from restuning._files import (
    Claim,
    digest_file,
    lies_inside,
    refuse_special,
    replacing,
    sha256_of_file,
    sync,
)

DESCRIPTION = "task.json"
"""The file that says what a task is."""
WEIGHTS = "weights.safetensors"
"""The file of its weights."""
CARD = "README.md"
"""The file that tells people of it."""
SHA256 = "sha256"
"""Entry of `task.json`: of the files beside it, by name."""

_BESIDE = re.compile(r"\.weights-[0-9a-f]{16}\.safetensors")


def write_folder(
    path: Path, tensors: Mapping[str, Tensor], describe: Callable[[str], str], card: str
) -> None:
    """Write a task folder, or exchange the task in one that is there; other files in it stay.

    Args:
        path: Of the folder.
        tensors: The weights.
        describe: Gives the text of `task.json` for the sha256 of the weights' file.
        card: The text of `README.md`.

    Raises:
        OSError: The disk is full or cannot be written; what was there is as it was.
        SafetensorError: The weights cannot be written, likewise.
    """
    if not path.exists():
        try:
            with replacing(path) as aside:
                aside.mkdir()
                _write(aside / WEIGHTS, tensors, aside / DESCRIPTION, describe, aside / CARD, card)
            return
        except OSError as error:
            # Another process made the folder meanwhile: a rename does not go over one with files.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not path.is_dir():
                raise
    with Claim.of_folder(path):
        _exchange(path, tensors, describe, card)


def find_weights(path: Path, description: Mapping[str, Any]) -> Path | None:
    """The weights that a description belongs to; None where there are others only.

    Args:
        path: A task folder.
        description: Its `task.json`; before it named them, the weights' usual name was all.

    Raises:
        OSError: They cannot be read.
    """
    usual, sha256 = path / WEIGHTS, description.get(SHA256, {}).get(WEIGHTS)
    if sha256 is None:
        refuse_leaving(usual)
        refuse_special(usual)
        return usual
    # A save that was killed in the middle left them under the other name.
    for file in (usual, path / _name_beside(sha256)):
        refuse_leaving(file)
        if file.exists() and digest_file(file) == sha256:
            return file
    if not usual.exists():
        usual.stat()
    return None


def files_of(path: Path) -> list[Path]:
    """The files of a task that are there, also the weights that a save left under their other name.

    Raises:
        FormatError: One is a link that leaves the folder.
    """
    files = [path / name for name in (DESCRIPTION, WEIGHTS, CARD) if (path / name).exists()]
    files += [file for file in path.iterdir() if _BESIDE.fullmatch(file.name)]
    for file in files:
        refuse_leaving(file)
    return files


def refuse_leaving(file: Path) -> None:
    """Refuse a file of a task that is a link to what lies elsewhere.

    A task folder may come from a stranger, and so may a link in it: what it points to would be read,
    and pushed to a hub, as the stranger's own. The cache of the hub is made of links into itself.

    Raises:
        FormatError: It is.
    """
    if not file.is_symlink():
        return
    home = file.parent.resolve()
    if not lies_inside(file, home, *_blobs_of(home)):
        raise FormatError(
            "a file of a task is a link that leaves its folder",
            where=str(file),
            found=f"a link to {os.readlink(file)}"[:300],
            fix="put the file itself there; the whole folder may be a link",
        )


def _blobs_of(home: Path) -> list[Path]:
    """Where the cache of a hub keeps what a folder in it links to: of the repository, and of all of them."""
    # snapshots/COMMIT, or snapshots/COMMIT/TASK.
    for snapshot in (home, home.parent):
        if snapshot.parent.name == "snapshots":
            repository = snapshot.parent.parent
            own = [repository / "blobs"]
            shared = repository.name.startswith("models--")
            return [*own, repository.parent / "blobs"] if shared else own
    return []


def take_usual_names(path: Path, description: Mapping[str, Any]) -> None:
    """End what a save left that was killed in the middle, in a folder that nobody else writes.

    Raises:
        OSError: It cannot be done.
    """
    file = find_weights(path, description)
    if file is not None and file.name != WEIGHTS:
        file.replace(path / WEIGHTS)
    _remove_beside(path)


def _exchange(
    path: Path, tensors: Mapping[str, Tensor], describe: Callable[[str], str], card: str
) -> None:
    """Each file takes its name when the stack is left: `task.json` first, which is the step."""
    beside: Path | None = None
    try:
        with ExitStack() as files:
            readme = files.enter_context(replacing(path / CARD))
            weights = files.enter_context(replacing(path / WEIGHTS))
            description = files.enter_context(replacing(path / DESCRIPTION))
            sha256 = _write(weights, tensors, description, describe, readme, card)
            # Whatever needs room is done: from here on only names change.
            beside = path / _name_beside(sha256)
            _give_second_name(weights, beside)
    except BaseException as error:
        if beside is None or not _is_described(path, beside):
            if beside is not None:
                beside.unlink(missing_ok=True)
            raise
        if not isinstance(error, OSError):
            raise
        # The new task is there, and is read as it is; the next save tidies up.
        warn(
            "a task was saved, but not all of its files took their usual names",
            where=str(path),
            found=error.strerror or str(error),
            fix="save it again before you copy single files of it",
        )
        return
    _remove_beside(path)


def _remove_beside(path: Path) -> None:
    for left in path.iterdir():
        if _BESIDE.fullmatch(left.name):
            left.unlink(missing_ok=True)


def _write(
    weights: Path,
    tensors: Mapping[str, Tensor],
    description: Path,
    describe: Callable[[str], str],
    readme: Path,
    card: str,
) -> str:
    """Write all three and wait for the disk; the sha256 of the weights."""
    save_file(dict(tensors), weights)
    sha256 = sha256_of_file(weights)
    description.write_text(describe(sha256), encoding="utf-8")
    readme.write_text(card, encoding="utf-8")
    # safetensors makes files that nobody else may read, whatever the user's mask says.
    weights.chmod(stat.S_IMODE(readme.stat().st_mode))
    for file in (weights, description, readme):
        sync(file)
    return sha256


def _give_second_name(file: Path, name: Path) -> None:
    name.unlink(missing_ok=True)
    try:
        os.link(file, name)
    except (OSError, NotImplementedError):
        # A file system without links.
        shutil.copyfile(file, name)
        sync(name)


def _name_beside(sha256: str) -> str:
    return f".weights-{sha256[:16]}.safetensors"


def _is_described(path: Path, beside: Path) -> bool:
    """Whether the `task.json` that is there now belongs to these weights."""
    try:
        return sha256_of_file(beside) in (path / DESCRIPTION).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
