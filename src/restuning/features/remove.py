"""Remove a store: what is provably of one, and nothing else."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from restuning._errors import FormatError, StoreError
from restuning._files import SUFFIX, Claim, read_json
from restuning.features.manifest import KEY, MANIFEST

_OURS = (
    re.escape(KEY),
    re.escape(MANIFEST),
    r"manifest\.lock",
    r"share\.\d+-of-\d+\.json",
    r"\w[\w-]*\.labels\.npy",
    r"\w[\w-]*\.\d+\.\d{8,}\.(npy|scales\.npy|json|lock)",
)
_FILE = re.compile("|".join(_OURS))
_ASIDE = re.compile(rf"\.({'|'.join(_OURS)})\..*{re.escape(SUFFIX)}")
"""What a writer that was killed left aside."""

_FIELDS = {"schema", "backbone", "taps", "tokens", "dtype", "data", "views", "splits"}


def is_file_of_store(name: str) -> bool:
    """Whether a file is called as one of a store is, and is no lock."""
    return _FILE.fullmatch(name) is not None and not name.endswith(".lock")


@dataclass(frozen=True)
class Removed:
    """What removing a store did.

    Attributes:
        bytes: Freed.
        kept: Names of what else lies in its folder: it is not of the store, and stays.
    """

    bytes: int
    kept: tuple[str, ...] = ()


def remove(path: str | Path) -> Removed:
    """Delete the files of a store, and its folder if that is empty then.

    Only a folder whose `key.json` or manifest is that of a store (of any schema) is one, and only
    plain files of names that a store has are deleted: no folder in it, no link, nothing behind one.

    Args:
        path: Its folder.

    Raises:
        StoreError: It is no store, is being built by another process, or cannot be deleted.
    """
    path = Path(path)
    _refuse_what_is_no_store(path)
    try:
        for lock in path.glob("*.lock"):
            if _FILE.fullmatch(lock.name) and not lock.is_symlink():
                _refuse_writer(lock, path)
        return _remove_files(path)
    except (OSError, FormatError) as error:
        raise StoreError(
            "a store cannot be removed",
            where=str(path),
            found=getattr(error, "strerror", None) or getattr(error, "found", ""),
            fix="check its permissions",
        ) from None


def _refuse_what_is_no_store(path: Path) -> None:
    found = "a link: give the folder itself" if path.is_symlink() else "no folder"
    if path.is_dir() and not path.is_symlink():
        found = "no key.json and no manifest.json of a store that can be read"
        for name in (KEY, MANIFEST):
            try:
                content = read_json(path / name)
            except FormatError:
                continue
            key = content if name == KEY else content.get("key")
            if isinstance(key, dict) and key.keys() >= _FIELDS and isinstance(key["schema"], int):
                return
    raise StoreError(
        "no feature store",
        where=str(path),
        found=found,
        fix="`restuning cache ls` lists them; what is no store by its own files, remove by hand",
    )


def _refuse_writer(lock: Path, path: Path) -> None:
    claim = Claim.take(lock, wait=False)
    if claim is None:
        raise StoreError(
            "a store is being built",
            where=str(path),
            found=f"another process has {lock.name}",
            fix="wait for it, or end it",
        )
    claim.give_back()


def _remove_files(path: Path) -> Removed:
    # By the folder's descriptor: it cannot become another one, or a link, while files are deleted.
    folder = None if os.name == "nt" else os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    freed, names = 0, os.listdir(path if folder is None else folder)
    try:
        # The manifest first: what is half deleted must not look finished. The key last: as long as
        # it is there, this can be gone on with.
        for name in sorted(filter(_is_ours, names), key=lambda n: (n != MANIFEST, n == KEY, n)):
            file = path / name if folder is None else name
            about = os.stat(file, dir_fd=folder, follow_symlinks=False)
            if stat.S_ISREG(about.st_mode):
                os.unlink(file, dir_fd=folder)
                freed += about.st_size
        kept = tuple(sorted(os.listdir(path if folder is None else folder)))
    finally:
        if folder is not None:
            os.close(folder)
    if not kept:
        path.rmdir()
    return Removed(freed, kept)


def _is_ours(name: str) -> bool:
    return bool(_FILE.fullmatch(name) or _ASIDE.fullmatch(name))
