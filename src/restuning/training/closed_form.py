"""Solve a task's closed-form classifiers on stored features, before anything else is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from restuning._errors import TrainingError
from restuning.bypass import Ridge
from restuning.features import StoredFeatures
from restuning.task import Task

ROWS = 256
"""Rows that are read at a time."""


class WithAnswers(Dataset):
    """Stored features, and beside them what closed-form classifiers answer to each row left out.

    Args:
        features: Of the training split.
        answers: Name of a tap to `n C`. A mirrored image has the answer of its plain one.
    """

    whole_batches = True

    def __init__(self, features: StoredFeatures, answers: dict[str, Tensor]) -> None:
        self.features, self.answers = features, answers
        self.store, self.views, self.labels = features.store, features.views, features.labels

    def __len__(self) -> int:
        """Number of inputs."""
        return len(self.features)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], int]:
        """One input's taps and answers (without a batch axis) and its label."""
        taps, label = self.features[index]
        return taps | {name: rows[index] for name, rows in self.answers.items()}, label

    def __getitems__(self, indices: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        """A whole batch of plain views."""
        return self.gather(indices, [0] * len(indices))

    def view(self) -> int:
        """As of the features."""
        return self.features.view()

    def gather(
        self, indices: Sequence[int], views: Sequence[int]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Taps, answers and labels of a batch."""
        taps, labels = self.features.gather(indices, views)
        at = torch.as_tensor(list(indices))
        return taps | {name: rows[at] for name, rows in self.answers.items()}, labels


def solve_closed_form(tasks: Sequence[Task], train: Any) -> Any:
    """Fit every `Ridge` of some tasks on a training split; the split with its answers beside.

    One pass over the features for all of them; the same data give the same solution, so a run that was
    killed goes on as it was. Nothing happens where there is none.

    Args:
        tasks: Whose classifiers are fitted, in place.
        train: The training split, also one that holds answers already.

    Raises:
        TrainingError: There is one, and features are not stored.
    """
    found: dict[str, list[Ridge]] = {}
    for module in (m for task in tasks for m in task.modules()):
        if isinstance(module, Ridge):
            found.setdefault(module.name, []).append(module)
    if not found:
        return train
    if isinstance(train, WithAnswers):
        train = train.features
    if not isinstance(train, StoredFeatures):
        raise TrainingError(
            "a classifier in closed form is solved from stored features",
            where="ridge",
            found="inputs that are not stored",
            fix="let them be stored (no --no-cache, no random augmentation; `restuning cache`)",
        )
    inputs: dict[str, list[Tensor]] = {name: [] for name in found}
    for start in range(0, len(train), ROWS):
        rows = list(range(start, min(start + ROWS, len(train))))
        taps, _ = train.gather(rows, [0] * len(rows))
        for name, same in found.items():
            device = same[0].weight.device
            near = {tap: taps[tap].to(device) for tap in same[0].taps}
            inputs[name].append(same[0].inputs(near))
    answers = {}
    for name, (first, *others) in found.items():
        answers[name] = first.fit(torch.cat(inputs[name]), train.labels).cpu()
        for other in others:
            other.load_state_dict(first.state_dict())
    return WithAnswers(train, answers)
