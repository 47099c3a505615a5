"""Whether probabilities mean what they say: of answers told at 70 % seven of ten are right."""

from __future__ import annotations

import torch
from torch import Tensor

from restuning.problems.judged import Reliability

BINS = 15
"""Of confidences (Guo et al. 2017, and the default of torchmetrics)."""


def calibration_error(confidence: Tensor, right: Tensor) -> float:
    r"""`sum_b n_b / n |accuracy_b - mean confidence_b|`: the expected calibration error (ECE).

    Over `BINS` bins of equal width of the highest probability; a bin holds its lower bound, and 1 is in a
    bin of its own, as in torchmetrics (Naeini et al. 2015).

    Args:
        confidence: Highest probability of each answer, `n`.
        right: Whether it was right, `n`.

    Returns:
        From 0 (of answers told at 70 % seven of ten are right) to 1.
    """
    # `n_b |accuracy_b - confidence_b|` is the sum of what each answer of the bin is off.
    off = right.cpu().double() - confidence.cpu().double()
    return float(_sum_in_bins(confidence, off).abs().sum()) / len(confidence)


def find_reliability(confidence: Tensor, right: Tensor) -> Reliability:
    """What was told and what was right in each bin of `calibration_error`."""
    ones = torch.ones(len(confidence), dtype=torch.float64)
    counts = _sum_in_bins(confidence, ones)
    there = counts > 0
    told, hits = (
        _sum_in_bins(confidence, each.cpu().double())[there] / counts[there]
        for each in (confidence, right)
    )
    return Reliability(told.tolist(), hits.tolist(), counts[there].long().tolist())


def _sum_in_bins(confidence: Tensor, values: Tensor) -> Tensor:
    confidence = confidence.cpu()
    bounds = torch.linspace(0, 1, BINS + 1, dtype=confidence.dtype)
    place = torch.bucketize(confidence, bounds, right=True) - 1
    return torch.zeros(BINS + 1, dtype=torch.float64).index_add_(0, place, values)
