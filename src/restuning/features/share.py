"""Shares of a store: workers that know nothing of each other write one each, and merging proves them whole.

A worker claims nothing and asks nobody: its number says which shards are its own. It leaves a mark
that says so when it begins, and what it wrote when it has ended. So workers may have a folder
together, or one each that are copied into one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from restuning._errors import RestuningError, StoreError
from restuning._files import expand_home, seal, sha256_of_file, write_bytes
from restuning.data.digests import digest_files
from restuning.features.away import Away
from restuning.features.extract import cut, finish_once
from restuning.features.key import StoreKey
from restuning.features.manifest import (
    MANIFEST,
    MARKS,
    Shard,
    read_content,
    read_entry,
    read_key,
)
from restuning.features.store import Store, default_root, is_store, list_of_data
from restuning.features.writing import explain_write_errors

MOST_SHARES = 100_000
"""Far more than a cluster runs at once."""


@dataclass(frozen=True)
class Share:
    """One worker's part of a store: of the shards in their order each `of`-th, from the `number`-th.

    Attributes:
        number: From 1.
        of: How many there are.
    """

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Share:
        """Read `3/8`.

        Raises:
            StoreError: It does not read so.
        """
        match = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", text, re.ASCII)
        if not match or not int(match[1]) <= int(match[2]) <= MOST_SHARES:
            raise StoreError(
                "not a share of a store",
                found=text,
                fix="give --shard NUMBER/COUNT, from 1/8 to 8/8 for eight workers",
            )
        return cls(int(match[1]), int(match[2]))

    def pick(self, plan: Sequence[Shard]) -> list[Shard]:
        """Its shards: of every split with as many shards as there are workers, some."""
        return list(plan[self.number - 1 :: self.of])

    @property
    def file(self) -> str:
        """Name of its mark."""
        return f"share.{self.number}-of-{self.of}.json"

    def __str__(self) -> str:
        """As users write it."""
        return f"{self.number}/{self.of}"


@dataclass(frozen=True)
class Mark:
    """What a worker says of its share.

    Attributes:
        share: Which.
        key: Digest of the store's key.
        batch_size: Inputs of one forward.
        rows: Of one shard.
        entries: sha256 of what stands beside each of its shards, by name; None until all are there.
    """

    share: Share
    key: str
    batch_size: int
    rows: int
    entries: Mapping[str, str] | None

    def write(self, folder: Path) -> None:
        """Leave it in the store's folder."""
        content = vars(self) | {"share": self.share.number, "of": self.share.of}
        with explain_write_errors(folder):
            write_bytes(folder / self.share.file, json.dumps(seal(content)).encode())


def begin_share(folder: Path, key: StoreKey, share: Share, batch_size: int, rows: int) -> Mark:
    """Say that a worker begins, where that fits what others have said.

    Raises:
        StoreError: Others count their shares otherwise, or write another store here.
    """
    mark = Mark(share, key.digest, batch_size, rows, None)
    for other in read_marks(folder):
        _refuse_other_kind(folder, other, mark)
    # One that has ended may be merged at this moment, and is not taken back.
    if not (folder / share.file).exists():
        mark.write(folder)
    return mark


def end_share(folder: Path, mark: Mark, shards: Sequence[Shard]) -> None:
    """Say that all of a worker's shards are there."""
    entries = {shard.name: sha256_of_file(folder / f"{shard.name}.json") for shard in shards}
    Mark(mark.share, mark.key, mark.batch_size, mark.rows, entries).write(folder)


def read_marks(folder: Path) -> list[Mark]:
    """What workers have said, in the order of their numbers.

    Raises:
        StoreError: A mark is not as it was written.
    """
    marks = [_read_mark(file) for file in folder.glob(MARKS)]
    return sorted(marks, key=lambda mark: (mark.share.of, mark.share.number))


def merge_shares(name: str | Path, root: str | Path | None = None) -> Store:
    """Make a store of the shares that workers wrote: its files are those of one that was built at once.

    Neither data nor backbone are read. Every file is compared with what its worker wrote, before
    anything is made of it. Merging again opens the store.

    Args:
        name: The data as the workers were given them (their name is enough), or the store's folder.
        root: Where stores lie, a folder or a URL; None for the usual place (`default_root`).

    Raises:
        StoreError: There are no shares, one is missing or not finished, they are counted in two
            ways or are of several stores, or a file is damaged; it names which, and what to do.

    Cost: a pass over the bytes of the store.
    """
    away = Away.of(root)
    if away is not None:
        return _merge_away(name, away)
    folder = _find_shared(name, default_root() if root is None else Path(root))
    return _merge_once(folder)


def _merge_away(name: str | Path, away: Away) -> Store:
    """At a URL: all comes here, is compared, and what makes a store of it goes there."""
    there = away.fetch_keys()
    of_data = {path.name for path in list_of_data(name, away.root)} | {str(name)}
    for store in sorted(of_data & there.keys()):
        if MANIFEST in there[store]:
            away.fetch(store)
        else:
            away.fetch_unfinished(store)
    merged = _merge_once(_find_shared(name, away.root))
    away.put_finished(merged.path.name)
    return merged


def _merge_once(folder: Path) -> Store:
    try:
        if not (folder / MANIFEST).exists():
            _merge(folder)
    except RestuningError:
        # Another merge that ended meanwhile takes the marks away; it has proved what we wanted to.
        if not (folder / MANIFEST).exists():
            raise
    return Store(folder)


def _merge(folder: Path) -> None:
    key, marks = read_key(folder), read_marks(folder)
    if not marks:
        raise StoreError(
            "no shares of a store",
            where=str(folder),
            found="a store that is not finished, and that no worker has a share of",
            fix="run the same `restuning cache` again, which goes on with it",
        )
    for mark in marks:
        _refuse_other_kind(folder, mark, Mark(marks[0].share, key.digest, *_sizes(marks[0]), None))
    _refuse_missing(folder, marks)
    plan = cut(key, marks[0].rows)
    for mark in marks:
        _compare(folder, key, mark, mark.share.pick(plan))
    finish_once(folder, key, plan)


def _sizes(mark: Mark) -> tuple[int, int]:
    return mark.batch_size, mark.rows


def _read_mark(file: Path) -> Mark:
    try:
        content = read_content(file, sealed=True)
        share = Share.parse(f"{content['share']}/{content['of']}")
        entries = content["entries"]
        if entries is not None:
            entries = {str(name): str(digest) for name, digest in entries.items()}
        mark = Mark(
            share, str(content["key"]), int(content["batch_size"]), int(content["rows"]), entries
        )
        if mark.rows < 1 or mark.batch_size < 1:
            raise ValueError("no rows")
        if share.file != file.name:
            raise ValueError(f"it says that it is {share}")
    except StoreError as error:
        raise _bad_mark(file, error.found) from None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise _bad_mark(file, f"{type(error).__name__}: {error}") from None
    return mark


def _bad_mark(file: Path, found: str) -> StoreError:
    return StoreError(
        "the mark of a share is damaged",
        where=str(file),
        found=found,
        fix="remove it and run its worker again, which keeps the shards that are there",
    )


def _refuse_other_kind(folder: Path, there: Mark, ours: Mark) -> None:
    if there.key != ours.key:
        raise StoreError(
            "a share of another store lies here",
            where=str(folder / there.share.file),
            found=f"key {there.key[:12]}, this store's is {ours.key[:12]}: other data, another "
            "backbone, or other options",
            fix="remove that file, and the shards that came with it; if its worker is one of these, "
            f"run it again with their options: --shard {there.share}",
        )
    if there.share.of != ours.share.of:
        raise StoreError(
            "a store is shared out in two ways",
            where=str(folder),
            found=f"share {there.share}, and {ours.share}",
            fix=f"run all workers with one count; {there.share.file} and its like of the other count may "
            "be removed, what they wrote is kept",
        )
    if _sizes(there) != _sizes(ours):
        raise StoreError(
            "workers of one store cut it in two ways",
            where=str(folder),
            found=f"share {there.share}: batches of {there.batch_size}, {there.rows} rows a shard; "
            f"share {ours.share}: {ours.batch_size} and {ours.rows}",
            fix="give all of them one --batch-size and one --shard-size",
        )


def _refuse_missing(folder: Path, marks: Sequence[Mark]) -> None:
    of = marks[0].share.of
    begun = {mark.share.number for mark in marks}
    told = {Share(n, of): "was never begun, or not copied here" for n in range(1, of + 1)}
    for mark in marks:
        told[mark.share] = "was begun and has not finished: it runs, or was stopped"
        if mark.entries is not None:
            del told[mark.share]
    if told:
        first = next(iter(told))
        found = "; ".join(f"{share} {why}" for share, why in list(told.items())[:8])
        raise StoreError(
            "shares of a store are missing",
            where=str(folder),
            found=f"{len(begun)} of {of} marks; {found}{'; ...' if len(told) > 8 else ''}",
            fix=f"run `restuning cache` with --shard {first} and the options of the others, into this "
            "folder or copied to it, then merge again",
        )


def _compare(folder: Path, key: StoreKey, mark: Mark, shards: Sequence[Shard]) -> None:
    """Refuse a share whose files are not what its worker wrote."""
    wanted = mark.entries or {}
    if wanted.keys() != {shard.name for shard in shards}:
        raise _bad_mark(folder / mark.share.file, "it tells of other shards than its own")
    files: dict[Path, str] = {folder / f"{name}.json": sha for name, sha in wanted.items()}
    found = "it is missing, or its contents do not match their sha256"
    for file, digest in zip(files, digest_files(list(files)), strict=True):
        if digest != files[file]:
            raise _broken(file, mark.share, found)
    values = {}
    for shard in shards:
        entry = folder / f"{shard.name}.json"
        try:
            content = read_entry(folder, key, shard)
        except StoreError as error:
            raise _broken(entry, mark.share, f"{error.where}: {error.found}") from None
        values |= {folder / each["file"]: (entry, each["sha256"]) for each in content["files"]}
    for file, digest in zip(values, digest_files(list(values)), strict=True):
        entry, sha = values[file]
        if digest != sha:
            raise _broken(entry, mark.share, f"{file.name}: {found}")


def _broken(entry: Path, share: Share, found: str) -> StoreError:
    return StoreError(
        "a share of a store is damaged",
        where=str(entry),
        found=found,
        fix=f"copy it again; or remove it, run `restuning cache` with --shard {share} again, which "
        "computes that shard alone, and merge",
    )


def _find_shared(name: str | Path, root: Path) -> Path:
    """The store of these data that workers share, or that was merged already."""
    given = expand_home(name)
    if is_store(given):
        return given
    of_data = list_of_data(name, root)
    begun = [p for p in of_data if not (p / MANIFEST).exists() and any(p.glob(MARKS))]
    if len(begun) == 1:
        return begun[0]
    if begun:
        raise StoreError(
            "shares of several stores",
            where=str(root),
            found="; ".join(_describe(path, of_data) for path in begun)[:1500],
            fix="give the folder of the one that is meant; shares that belong to it and lie in another "
            "were written from other data, by another backbone or under other options: run those "
            "again with the options of the rest (`restuning cache rm` removes what is not needed)",
        )
    whole = [path for path in of_data if (path / MANIFEST).exists()]
    if len(whole) == 1:
        return whole[0]
    if whole:
        raise StoreError(
            "no shares of a store",
            where=str(root),
            found=f"{len(whole)} that are whole: {', '.join(path.name for path in whole[:4])}",
            fix="nothing is to be merged; `restuning cache info` says what each is",
        )
    raise StoreError(
        "no shares of a store",
        where=str(root),
        found=f"nothing of {str(name)!a}",
        fix="workers write them: `restuning cache DATA --shard 1/4 --store DIR`, up to 4/4",
    )


def _describe(path: Path, keys: Mapping[Path, StoreKey]) -> str:
    """A store by its shares, and by what is another than in the first of the others."""
    marks = [str(mark.share) for mark in read_marks(path)]
    first = next(other for other in keys if other != path)
    ours, theirs = keys[path].to_dict(), keys[first].to_dict()
    other = [name for name in ours if ours[name] != theirs.get(name)]
    more = ", ..." if len(marks) > 8 else ""
    return f"{path.name} has {', '.join(marks[:8])}{more} (differs in {', '.join(other)})"
