"""Training from a store: features as a data set, and a task that is fed with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


class StoredFeatures(Dataset):
    """Rows of one or more splits of a store as `(taps, label)`.

    A loader gets whole batches: `__getitems__` reads them in one gather.

    Args:
        store: Opened.
        splits: Put one after the other ("train", then "val" for a final run).
        views: How many of the training split's views are drawn from; 1 is the image itself.
        targets: Of all rows, in place of the labels that are stored, `n` or `n ...`.
        mirror: Targets of mirror images, which the second view is of; None where they are the same.

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
        self.places = [(s, i) for s in splits for i in range(store.key.splits[s])]
        self.targets, self.mirror = targets, mirror
        self.labels = torch.cat([store.labels(s) for s in splits]) if targets is None else targets

    def __len__(self) -> int:
        """Number of inputs."""
        return len(self.places)

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
        taps, labels = self.gather([index], [self.view()])
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
        # Rows lie in files by split and view: each group is read at once, then put in order.
        groups: dict[tuple[str, int], list[int]] = {}
        for position, (index, view) in enumerate(zip(indices, views, strict=True)):
            split = self.places[index][0]
            # Only the training split has views; of train and val together, val stays plain.
            groups.setdefault((split, view if split == "train" else 0), []).append(position)
        parts = [
            self.store.rows(split, view, [self.places[indices[p]][1] for p in positions])
            for (split, view), positions in groups.items()
        ]
        if len(parts) == 1:
            return self.store.taps(parts[0]), labels
        order = torch.tensor([p for positions in groups.values() for p in positions])
        return self.store.taps(torch.cat(parts)[order.argsort()]), labels

    def _labels_of(self, indices: Sequence[int], views: Sequence[int]) -> Tensor:
        labels = self.labels[torch.as_tensor(list(indices))]
        if self.mirror is None or FLIP not in views:
            return labels
        flipped = [
            place
            for place, (index, view) in enumerate(zip(indices, views, strict=True))
            if view == FLIP and self.places[index][0] == "train"
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
