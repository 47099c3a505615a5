"""Several trained tasks that answer together, against one of the same size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from restuning._errors import TrainingError
from restuning.problems import to_probabilities


def predict_probabilities(tuned: nn.Module, data: Any, collate: Any = None) -> Tensor:
    """Compute the probabilities of all classes for every input, `n c`, in eval mode.

    At the temperature of the task; a rival that is none has 1.
    """
    tuned.eval()
    temperature = getattr(getattr(tuned, "task", None), "temperature", 1.0)
    with torch.no_grad():
        parts = [
            to_probabilities(tuned(x), temperature)
            for x, _ in DataLoader(data, 64, collate_fn=collate)
        ]
    return torch.cat(parts)


def ensemble_accuracy(members: Sequence[Tensor], labels: Tensor) -> float:
    """Accuracy of an ensemble that answers with the mean of its members' probabilities.

    Args:
        members: `n c` each.
        labels: `n`.

    Raises:
        TrainingError: No member.
    """
    if not members:
        raise TrainingError("an ensemble needs a member")
    return float((torch.stack(list(members)).mean(0).argmax(1) == labels).float().mean())


def disagreement(members: Sequence[Tensor]) -> float:
    """Share of inputs, over pairs of members, that two members answer differently."""
    classes = [m.argmax(1) for m in members]
    pairs = [(a, b) for n, a in enumerate(classes) for b in classes[n + 1 :]]
    if not pairs:
        return 0.0
    return float(torch.stack([(a != b).float().mean() for a, b in pairs]).mean())
