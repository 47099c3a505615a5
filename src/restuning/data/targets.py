"""Targets of a split, together; and a split without them, of which features are stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from restuning.data.data import Data, MediaDataset
from restuning.data.digests import Tell, quiet
from restuning.data.identity import Samples, find_samples, label_digests, list_files
from restuning.problems import IGNORED, SingleLabel


class WithoutTargets(Dataset):
    """A split whose examples all have the label 0: stored features of it serve whatever is asked of its inputs.

    Args:
        split: Map-style data set of `(input, target)`.
    """

    def __init__(self, split: Any) -> None:
        self.split = split

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """One input."""
        return self.split[index][0], 0

    @property
    def fetch(self) -> Callable[[Sequence[int]], list[Any]] | None:
        """That of the split, where it reads several inputs together (`data/packed.py`)."""
        return getattr(self.split, "fetch", None)

    def make(self, indices: Sequence[int], contents: Sequence[Any]) -> list[tuple[Any, int]]:
        """Inputs of what was fetched."""
        return [(x, 0) for x, _ in self.split.make(indices, contents)]

    @property
    def files(self) -> list:
        """One an example, where it is of files."""
        return list_files(self.split) or []

    def sample_digests(self, tell: Tell = quiet) -> Samples | None:
        """Of the inputs, where they are known one by one."""
        known = find_samples(self.split, tell)
        if known is None:
            return None
        return Samples(known.inputs, label_digests([0] * len(known.inputs)), known.reading)


def list_targets(split: Any) -> list[Any]:
    """The target of every example, without decoding an input where that is not needed."""
    if isinstance(labels := getattr(split, "labels", None), Tensor):
        return labels.tolist() if labels.ndim == 1 else list(labels)
    if isinstance(split, ConcatDataset):
        return [target for part in split.datasets for target in list_targets(part)]
    if isinstance(split, Subset):
        whole = list_targets(split.dataset)
        return [whole[int(n)] for n in split.indices]
    if isinstance(split, MediaDataset):
        return [split.label(n) for n in range(len(split))]
    return [split[n][1] for n in range(len(split))]


def has_targets_at_hand(split: Any) -> bool:
    """Whether `list_targets` reads none of the inputs: a class of the user's own may open a file for each."""
    if isinstance(split, ConcatDataset):
        return all(map(has_targets_at_hand, split.datasets))
    if isinstance(split, Subset):
        return has_targets_at_hand(split.dataset)
    known = isinstance(split, (MediaDataset, TensorDataset, list, tuple))
    return known or isinstance(getattr(split, "labels", None), Tensor)


def stack_targets(split: Any) -> Tensor:
    """The same as one tensor, `n` or `n ...`; of tagged words padded with `IGNORED`, `n t`."""
    targets = list_targets(split)
    if targets and isinstance(targets[0], Tensor):
        return torch.stack(targets)
    if targets and isinstance(targets[0], Sequence):
        longest = max(map(len, targets))
        targets = [[*each, *[IGNORED] * (longest - len(each))] for each in targets]
    return torch.tensor(targets)


def for_store(data: Data) -> Data:
    """The data set as features of it are stored: without targets, where these are kept beside a store."""
    if not data.beside:
        return data
    splits = {name: getattr(data, name) for name in ("train", "val", "test")}
    plain = {name: None if each is None else WithoutTargets(each) for name, each in splits.items()}
    other = data.with_splits(**plain)
    other.labels, other.problem, other.beside = [], SingleLabel(), False
    return other
