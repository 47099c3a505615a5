"""What a finished run gives back."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class FitResult:
    """The figures of a finished run.

    Args:
        history: One entry an epoch: epoch, step, loss, accuracy, val_loss, val_accuracy, lr and
            seconds; the val figures are None without validation data.
        seconds: Of training and evaluation, summed over all resumed parts.
        peak_memory_bytes: Above the start of the run, largest of its parts; None if unmeasurable.
        memory_measure: How that was measured.
        steps: Optimiser steps.
        train_loss: Of the last epoch.
        train_accuracy: Of the last epoch, while it trained.
        val_accuracy: Of the final weights.
        val_loss: Of the final weights.
    """

    history: list[dict[str, Any]]
    seconds: float
    peak_memory_bytes: int | None
    memory_measure: str
    steps: int
    train_loss: float
    train_accuracy: float
    val_accuracy: float | None
    val_loss: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they are written to JSON."""
        return asdict(self)
