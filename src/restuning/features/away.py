"""Stores at a URL (`s3://bucket/stores`): read and written in a folder of this machine that mirrors it.

Whatever is read was compared with its sha256 when it came; whatever is written goes there as soon as it is whole, what
says so last. There are no locks over a network: workers share a store by their numbers (`cache --shard`), and two that
write one store write the same bytes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from restuning._errors import StoreError
from restuning._files import cache_root, replacing, sha256_of_file
from restuning.data.digests import digest_files
from restuning.data.remote import call, is_url, show_url
from restuning.features.key import StoreKey
from restuning.features.manifest import (
    KEY,
    MANIFEST,
    MARKS,
    Shard,
    damaged,
    read_entry,
    read_key,
    read_manifest,
)
from restuning.features.remove import is_file_of_store, remove
from restuning.features.writing import explain_write_errors

MIRRORS = "away"
"""Folder of all mirrors, in `cache_root`: one a URL. It may be deleted while nothing runs."""

MOST = 64 * 2**30
"""Bytes of all mirrors: before a store comes that would make more, those that were opened longest ago go."""

WHOLE = ".whole"
"""Behind a store's name: an empty file beside its folder, where all of it is at its URL as well."""


@dataclass(frozen=True)
class Away:
    """The stores at a URL.

    Attributes:
        url: A folder, as the user typed it.
    """

    url: str

    @classmethod
    def of(cls, root: Any) -> Away | None:
        """Where a root of stores is a URL; None of a folder.

        Raises:
            StoreError: A URL that is signed for one file.
        """
        if not is_url(root):
            return None
        if "?" in root:
            raise StoreError(
                "a URL of stores is one of a folder",
                where=show_url(root),
                found="what signs one file, behind `?`",
                fix="give the folder, such as s3://bucket/stores, and sign in as its library does",
            )
        return cls(str(root).rstrip("/"))

    @property
    def root(self) -> Path:
        """The folder of this machine in which its stores are read and written."""
        digest = hashlib.sha256(self.url.encode(errors="surrogateescape")).hexdigest()[:24]
        return cache_root() / MIRRORS / digest

    def list_files(self) -> dict[str, set[str]]:
        """Names of files by the name of their store, of those that a store has; others are passed over."""

        def find(system: Any, path: str) -> list[str]:
            system.invalidate_cache()
            try:
                found = system.find(path)
            except FileNotFoundError:
                # Nobody has written there yet.
                return []
            top = path.rstrip("/")
            return [each[len(top) :].strip("/") for each in found if each.startswith(top)]

        files: dict[str, set[str]] = {}
        for each in call(self.url, find):
            store, slash, file = each.partition("/")
            plain = store not in ("", ".", "..") and not re.search(r"[\\\0]", store)
            if slash and plain and is_file_of_store(file):
                files.setdefault(store, set()).add(file)
        return {store: there for store, there in files.items() if KEY in there or MANIFEST in there}

    # Coming.

    def fetch_keys(self) -> dict[str, set[str]]:
        """Let the mirror know of every store, by its key; gives what `list_files` does."""
        there = self.list_files()
        for store, files in there.items():
            folder = self.root / store
            if KEY in files and not (folder / KEY).exists():
                self._fetch(store, KEY, folder / KEY)
        return there

    def fetch_covering(self, fits: Callable[[StoreKey], bool]) -> None:
        """Bring the first finished store whose key fits, where the mirror has none.

        Raises:
            StoreError: It is not what was written, or there is no room for it.
        """
        there = self.fetch_keys()
        for store in sorted(there):
            with suppress(StoreError):
                if not fits(read_key(self.root / store)):
                    continue
                if MANIFEST in there[store]:
                    break
        else:
            return
        self.fetch(store)

    def fetch(self, store: str) -> Path:
        """Bring a finished store, file by file; what is here and as it should be stays.

        Returns:
            Its folder.

        Raises:
            StoreError: A file is not what was written, or there is no room.
        """
        folder = self.root / store
        # Without its files beside it a manifest would tell of a damaged store. Each process has its own: several may
        # bring one store at once.
        with explain_write_errors(folder), replacing(folder / MANIFEST, apart=True) as coming:
            self._fetch(store, MANIFEST, coming)
            about = read_manifest(coming.parent, whole=False)
            self._make_room(folder, sum(file.bytes for file in about.files.values()))
            files = list(about.files.values())
            here = digest_files([folder / file.name for file in files])
            for file, digest in zip(files, here, strict=True):
                if digest != file.sha256:
                    self._fetch(store, file.name, folder / file.name, file.sha256)
        with explain_write_errors(folder):
            (self.root / f"{store}{WHOLE}").touch()
        return folder

    def fetch_shards(self, store: str, key: StoreKey, shards: Iterable[Shard]) -> None:
        """Bring what was written of some shards of a store that is not finished; a damaged one is left out."""
        there, folder = self.list_files().get(store, set()), self.root / store
        for shard in shards:
            entry = f"{shard.name}.json"
            if entry not in there or (folder / entry).exists():
                continue
            for name in shard.sizes(key):
                self._fetch(store, name, folder / name)
            self._fetch(store, entry, folder / entry)
            with suppress(StoreError):
                said = {f["file"]: f["sha256"] for f in read_entry(folder, key, shard)["files"]}
                if all(sha256_of_file(folder / name) == sha for name, sha in said.items()):
                    continue
            # It is computed again.
            (folder / entry).unlink()

    def fetch_marks(self, store: str) -> None:
        """Bring what workers say of their shares, where this machine does not know better."""
        for name in sorted(self.list_files().get(store, ())):
            if _is_mark(name) and not (self.root / store / name).exists():
                self._fetch(store, name, self.root / store / name)

    def fetch_unfinished(self, store: str) -> None:
        """Bring all that workers have left of a store: `merge_shares` compares it with what they say."""
        folder = self.root / store
        for name in sorted(self.list_files().get(store, ())):
            # Values do not change once their entry is there; what is said of them may.
            if name.endswith(".json") or not (folder / name).exists():
                self._fetch(store, name, folder / name)

    def _fetch(self, store: str, name: str, to: Path, sha256: str = "") -> None:
        url = f"{self.url}/{store}/{name}"
        with explain_write_errors(to.parent):
            to.parent.mkdir(parents=True, exist_ok=True)
            with replacing(to) as partial:
                call(url, lambda system, path: system.get_file(path, str(partial)))
                if sha256 and sha256_of_file(partial) != sha256:
                    raise damaged(Path(show_url(url)), "its contents do not match their sha256")

    def _make_room(self, folder: Path, size: int) -> None:
        if size > MOST:
            raise StoreError(
                "a store at a URL is too large to be read from there",
                where=f"{show_url(self.url)}/{folder.name}",
                found=f"{size / 2**30:,.1f} GiB, of {MOST / 2**30:,.0f} GiB for all such stores on this machine",
                fix="copy it to a disk, and give --store that folder",
            )
        # Of those that are whole at their URL as well; the mark is touched whenever one is opened.
        marks = {
            mark: mark.with_name(mark.name.removesuffix(WHOLE))
            for mark in cache_root().glob(f"{MIRRORS}/*/*{WHOLE}")
        }
        sizes = {
            mark: sum(file.stat().st_size for file in store.iterdir())
            for mark, store in marks.items()
            if store != folder and (store / MANIFEST).exists()
        }
        for mark in sorted(sizes, key=lambda file: file.stat().st_mtime_ns):
            if sum(sizes.values()) + size <= MOST:
                break
            remove(marks[mark])
            mark.unlink()
            del sizes[mark]

    # Going.

    def put(self, store: str, names: Iterable[str]) -> None:
        """Write files of a store in this order."""
        for name in names:
            here = str(self.root / store / name)
            call(
                f"{self.url}/{store}/{name}",
                lambda system, path, here=here: system.put_file(here, path),
            )

    def put_shard(self, store: str, key: StoreKey, shard: Shard) -> None:
        """Write a shard that is whole."""
        self.put(store, [*shard.sizes(key), f"{shard.name}.json"])

    def put_missing(self, store: str, key: StoreKey, shards: Iterable[Shard]) -> None:
        """Write shards that were whole before, and are not there."""
        there = self.list_files().get(store, set())
        for shard in shards:
            if f"{shard.name}.json" not in there:
                self.put_shard(store, key, shard)

    def put_finished(self, store: str) -> None:
        """Write what is not there of a finished store, its manifest last."""
        folder = self.root / store
        there = self.list_files().get(store, set())
        if MANIFEST not in there:
            names = [KEY, *read_manifest(folder).files]
            self.put(store, [*(name for name in names if name not in there), MANIFEST])
        for name in there:
            if _is_mark(name):
                # The manifest says what they said.
                call(f"{self.url}/{store}/{name}", lambda system, path: system.rm_file(path))
        (self.root / f"{store}{WHOLE}").touch()


def _is_mark(name: str) -> bool:
    return PurePosixPath(name).match(MARKS)


def refuse_away(root: Any, what: str) -> None:
    """Refuse a root of stores that is a URL.

    Raises:
        StoreError: It is one.
    """
    if Away.of(root) is not None:
        raise StoreError(
            f"{what} takes stores in a folder, not at a URL",
            where=show_url(str(root)),
            fix="copy them to a disk and give --store that folder; what works at a URL is on the page docs/data.md",
        )


def mirror_of(
    name: str | Path, root: Any, find: Callable[[Path], Mapping[Path, Any]]
) -> Path | None:
    """The folder in which stores at a URL are looked for, after those that a name means have come; None of a folder.

    Args:
        name: Of data or a store.
        root: Folder or URL.
        find: The stores that the name means, in a folder.
    """
    away = Away.of(root)
    if away is None:
        return None
    there = away.fetch_keys()
    meant = {path.name for path in find(away.root)} | {s for s in there if s.startswith(str(name))}
    for store in sorted(meant & there.keys()):
        if MANIFEST in there[store]:
            away.fetch(store)
    return away.root
