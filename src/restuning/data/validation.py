"""A validation split for data that bring none."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Subset

from restuning._errors import DataError
from restuning.data.data import SPLIT_SEED, Data, MediaDataset, split_by_class
from restuning.problems import Embedding, SingleLabel

SHARE = 0.2
"""Of the training examples: VTAB-1K's 200 of 1000 (Zhai et al. 2019)."""


def with_validation(data: Data) -> Data:
    """The same data; where there is no validation split, a fifth of the training split, of each class
    where there are classes.

    It is drawn with a seed of its own, so that runs with other seeds see the same split.

    Raises:
        DataError: There are too few training examples to divide.
    """
    if data.val is not None:
        return data
    labels = [0] * len(data.train)
    if isinstance(data.problem, SingleLabel | Embedding):
        labels = [_label(data.train, index) for index in range(len(data.train))]
    val, train = split_by_class(labels, (SHARE,), SPLIT_SEED)
    if not train or not val:
        raise DataError(
            "too few examples to hold any out for validation",
            where=data.name,
            found=f"{len(labels)} training examples of {len(set(labels))} classes",
            fix="give two or more of a class, or a validation split",
        )
    return data.with_splits(train=Subset(data.train, train), val=Subset(data.train, val))


def _label(dataset: Any, index: int) -> int:
    """Without decoding an input; sentences of tagged words are all of one kind."""
    if isinstance(dataset, Subset):
        return _label(dataset.dataset, dataset.indices[index])
    if isinstance(dataset, MediaDataset):
        return dataset.label(index)
    # Features of a store and decoded images have all labels in one tensor.
    label = dataset.labels[index] if hasattr(dataset, "labels") else dataset[index][1]
    return 0 if isinstance(label, list) else int(label)
