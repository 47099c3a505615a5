"""Training from a store: features as a data set, and a task that is fed with them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from restuning._errors import StoreError
from restuning.data import Contents
from restuning.data.identity import combine, describe_reading, label_digests
from restuning.features.store import Store, lacks
from restuning.features.views import FLIP, draw_view
from restuning.host import Extractor
from restuning.sites import FEATURE, ONE_TOKEN, Features, Needs, split_tap, take_one_token
from restuning.task import Task

READ = 16 * 2**20
"""Bytes of rows that are decoded at a time where they are to be held."""


class StoredFeatures(Dataset):
    """Rows of one or more splits of a store as `(taps, label)`.

    A loader gets whole batches: `__getitems__` reads them in one gather.

    Args:
        store: Opened.
        splits: Put one after the other ("train", then "val" for a final run).
        views: How many of the training split's views are drawn from; 1 is the image itself.
        targets: Of all rows, in place of the labels that are stored, `n` or `n ...`.
        mirror: Targets of mirror images, which the second view is of; None where they are the same.
        at_once: How many inputs a run may hold in memory, where it cannot hold all: it then goes through the store
            in portions (`training.randomness.Portions`), and `hold` reads each.

    Raises:
        StoreError: No such split or view.
    """

    whole_batches = True

    def __init__(
        self,
        store: Store,
        splits: Sequence[str],
        views: int = 1,
        targets: Tensor | None = None,
        mirror: Callable[[Tensor], Tensor] | None = None,
        at_once: int | None = None,
    ) -> None:
        for split in splits:
            if split not in store.key.splits:
                raise StoreError("no such split in the store", where=str(store.path), found=split)
        if not 1 <= views <= len(store.key.views):
            raise StoreError(
                "the store has fewer views",
                where=str(store.path),
                found=f"{len(store.key.views)} views, {views} asked for",
                fix="build one with `restuning cache --views`",
            )
        self.store, self.splits, self.views = store, tuple(splits), views
        # Where each split begins, and all of them end.
        self._starts = [0, *accumulate(store.key.splits[s] for s in splits)]
        self.targets, self.mirror, self.at_once = targets, mirror, at_once
        # By split and view: which rows are held, in order, and they themselves.
        self._held: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self.labels = torch.cat([store.labels(s) for s in splits]) if targets is None else targets

    def __len__(self) -> int:
        """Number of inputs."""
        return self._starts[-1]

    @property
    def bytes_per_input(self) -> int:
        """Bytes of memory that an input takes in `hold`, in all its views."""
        return 4 * self.store.values_per_row * self.views

    @property
    def held(self) -> int:
        """Rows that `hold` has in memory, each view counted."""
        return sum(len(rows) for _, rows in self._held.values())

    def hold(self, indices: Tensor) -> None:
        """Read these inputs in all their views, in the order of the files, for `gather` to take from memory.

        What was held before is let go first, so that the two are never held together.
        """
        at = indices.unique()
        wanted: dict[tuple[str, int], Tensor] = {}
        for split, start, stop in zip(
            self.splits, self._starts[:-1], self._starts[1:], strict=True
        ):
            own = at[(at >= start) & (at < stop)] - start
            for view in range(self.views if split == "train" else 1) if len(own) else ():
                wanted[split, view] = own
        if wanted.keys() == self._held.keys() and all(
            torch.equal(own, self._held[place][0]) for place, own in wanted.items()
        ):
            return
        self._held = {}
        for (split, view), own in wanted.items():
            rows = torch.empty(len(own), self.store.values_per_row)
            # Piece by piece: decoding a row takes more than the row for a while.
            step = max(1, READ // (4 * self.store.values_per_row))
            for start in range(0, len(own), step):
                part = slice(start, start + step)
                rows[part] = self.store.rows(split, view, own[part])
            self._held[split, view] = own, rows

    @property
    def contents(self) -> Contents:
        """Those of the inputs that the features are of, and the form that these are kept in.

        A store that does not say what its inputs contain is known by its features.
        """
        key = self.store.key
        identity = key.data.get("identity")
        # Of what is read and not of all that is kept: a run goes on from a store that holds more.
        views = key.views[: self.views]
        form = (key.preprocessing, views, key.dtype, key.precision, self.store.form)
        reading = describe_reading("stored features", *form)
        if key.known_by_contents and isinstance(identity, Mapping):
            return contents_of_splits(self._with_targets(identity), self.splits, reading)
        labels = combine(label_digests(self.labels))
        return _join([(self.store.digest(s), labels) for s in self.splits], reading)

    def _with_targets(self, identity: Mapping[str, Any]) -> Mapping[str, Any]:
        """The contents of the splits, with the targets that stand in place of stored labels."""
        if self.targets is None:
            return identity
        sizes = [self.store.key.splits[split] for split in self.splits]
        told = dict(identity)
        for split, own in zip(self.splits, self.targets.split(sizes), strict=True):
            told[split] = {**identity[split], "labels": combine(label_digests(own))}
        return told

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Any]:
        """One input's taps (without a batch axis) and its label."""
        # From the end as well, and past it an error that ends a loop.
        taps, labels = self.gather([range(len(self))[index]], [self.view()])
        target = int(labels[0]) if labels.ndim == 1 else labels[0]
        return {name: tap[0] for name, tap in taps.items()}, target

    def __getitems__(self, indices: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        """A whole batch of plain views."""
        return self.gather(indices, [0] * len(indices))

    def view(self) -> int:
        """The view of one example, drawn from torch's generator (seeded by example and epoch)."""
        return draw_view(self.views) if self.views > 1 else 0

    def gather(
        self, indices: Sequence[int], views: Sequence[int]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Taps and labels of a batch."""
        labels = self._labels_of(indices, views)
        if len(self.splits) == 1 and not any(views):
            return self.store.taps(self._rows(self.splits[0], 0, list(indices))), labels
        # Rows lie in files by split and view: each group is read at once, then put in order.
        groups: dict[tuple[str, int], list[int]] = {}
        places = [self._place(index) for index in indices]
        for position, ((split, _), view) in enumerate(zip(places, views, strict=True)):
            # Only the training split has views; of train and val together, val stays plain.
            groups.setdefault((split, view if split == "train" else 0), []).append(position)
        parts = [
            self._rows(split, view, [places[p][1] for p in positions])
            for (split, view), positions in groups.items()
        ]
        if len(parts) == 1:
            return self.store.taps(parts[0]), labels
        order = torch.tensor([p for positions in groups.values() for p in positions])
        return self.store.taps(torch.cat(parts)[order.argsort()]), labels

    def _place(self, index: int) -> tuple[str, int]:
        """The split of an input, and its number there."""
        number = bisect_right(self._starts, index) - 1
        return self.splits[number], index - self._starts[number]

    def _rows(self, split: str, view: int, indices: Sequence[int]) -> Tensor:
        """Rows of a split: those that are held, or all of them from the store."""
        if (split, view) in self._held:
            at, rows = self._held[split, view]
            wanted = torch.as_tensor(indices)
            where = torch.searchsorted(at, wanted).clamp(max=len(at) - 1)
            if torch.equal(at[where], wanted):
                return rows.index_select(0, where)
        return self.store.rows(split, view, indices)

    def _labels_of(self, indices: Sequence[int], views: Sequence[int]) -> Tensor:
        labels = self.labels[torch.as_tensor(list(indices))]
        if self.mirror is None or FLIP not in views:
            return labels
        flipped = [
            place
            for place, (index, view) in enumerate(zip(indices, views, strict=True))
            if view == FLIP and self._place(index)[0] == "train"
        ]
        if flipped:
            labels[flipped] = self.mirror(labels[flipped])
        return labels


class Cached(nn.Module):
    """A task on stored features: what `Tuned` is on inputs. No backbone forward is made.

    Args:
        host: Lends its frozen final norm and pooling; must be the store's backbone.
        task: A bypass task, or a head alone (linear probing).
        store: Where the features come from.

    Raises:
        StoreError: The store is of another backbone, or lacks what the task needs.
    """

    def __init__(self, host: Extractor, task: Task, store: Store) -> None:
        super().__init__()
        self.host, self.task = host, task
        refuse_other_backbone(host, store)
        self._last, self._needs = host.sites.taps[-1], task.needs(host.readout_rule)
        if store.key.find(self._needs, self._last) is None:
            raise lacks(store.path, store.key, self._needs)

    def forward(self, **inputs: Tensor) -> Tensor:
        """Logits, `b c`, of stored taps and what was prepared beside them."""
        prepared = self.task.take_prepared(inputs)
        return self.task({**self.taps(**inputs), **prepared}, self.host.readout)

    def taps(self, **stored: Tensor) -> Features:
        """What the task reads of stored taps, with the readout."""
        return Features(select_taps(stored, self._needs, self._last), self.host.readout)


def select_taps(stored: Mapping[str, Tensor], needs: Needs, last: str) -> dict[str, Tensor]:
    """What is needed of stored taps, of which all tokens or just those were kept.

    Args:
        stored: Taps by the names that they are kept under.
        needs: Of a task.
        last: Name of the last tap, which needs may call "last".
    """
    found = {}
    for name in needs.taps:
        tap, part = split_tap(last if name == "last" else name)
        token = part or needs.tokens
        # As a part first: beside it the tap may be there as another token, or pooled.
        own = f"{tap}/{token}"
        single = token in ONE_TOKEN and tap != FEATURE
        value = stored[own] if own in stored or (part and not single) else stored[tap]
        found[name] = take_one_token(value, token) if single else value
    return found


def contents_of_splits(
    identity: Mapping[str, Any], splits: Sequence[str], reading: str = ""
) -> Contents:
    """What stored features of some splits, one after the other, are known by.

    Args:
        identity: `Data.contents` of the data set that they are of.
        splits: Names of them.
        reading: As of `Contents`.
    """
    parts = [(str(identity[split]["inputs"]), str(identity[split]["labels"])) for split in splits]
    return _join(parts, reading)


def _join(parts: Sequence[tuple[str, str]], reading: str) -> Contents:
    if len(parts) == 1:
        return Contents(*parts[0], reading)
    inputs, labels = (combine(column) for column in zip(*parts, strict=True))
    return Contents(inputs, labels, reading)


def refuse_other_backbone(host: Extractor, store: Store) -> None:
    """Compare fingerprints and the digests of all weights.

    Raises:
        StoreError: They differ.

    Cost: reads the backbone's weights once a host, about 1 s a gigabyte.
    """
    ours = {**host.fingerprint(), "all weights": host.digest()}
    theirs = {k: v for k, v in store.key.backbone.items() if k != "name"}
    if theirs != ours:
        different = [k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k)]
        raise StoreError(
            "the store is of another backbone",
            where=str(store.path),
            found="; ".join(f"{k}: {theirs.get(k)} stored, {ours.get(k)} here" for k in different),
            fix="use the backbone it was built with, or build a store for this one",
        )
