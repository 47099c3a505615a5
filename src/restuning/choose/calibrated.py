"""How well probabilities fit, whatever the loudness they are told with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.data import DataLoader

from restuning.train.batch import IGNORED, move, run

SCALES = tuple(2.0 ** (k / 4) for k in range(-20, 25))
"""Inverse temperatures that are tried: 1/32 to 64, a fifth apart."""


def calibrated_loss(logits: Tensor, labels: Tensor) -> float:
    r"""`min_s mean_i -log softmax(s z_i)[y_i]`: cross-entropy after the best of a few temperatures.

    Training to the end makes logits loud, which says nothing of who answers better (Guo et al. 2017).

    Args:
        logits: `n c`.
        labels: `n`.
    """
    return min(float(F.cross_entropy(scale * logits, labels)) for scale in SCALES)


@torch.no_grad()
def answers(
    tuned: nn.Module, data: Any, batch_size: int, collate: Callable | None = None
) -> tuple[Tensor, Tensor]:
    """Logits (`n c`) and labels (`n`) of a split, or of its labelled tokens, in eval mode.

    Args:
        tuned: With `.task`; left in eval mode.
        data: Map-style, of `(input, label)`.
        batch_size: Inputs at a time.
        collate: Makes a batch of a list of examples.
    """
    parameter = next(tuned.task.parameters(), None)  # type: ignore[union-attr]
    device = torch.device("cpu") if parameter is None else parameter.device
    tuned.eval()
    found, right = [], []
    for batch in DataLoader(data, batch_size, collate_fn=collate):
        inputs, labels = move(batch[0], batch[1], device)
        logits = run(tuned, inputs)
        counted = labels != IGNORED
        found.append(logits[counted].float().cpu())
        right.append(labels[counted].cpu())
    return torch.cat(found), torch.cat(right)
