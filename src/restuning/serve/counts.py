"""What a server has done so far, counted where it happens; `/metrics` tells of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from threading import Lock
from typing import Any


@dataclass
class Counts:
    """Of one backbone.

    Attributes:
        inputs: That were answered.
        forwards: Backbone forwards of a batch, shared ones and those of one task.
        batches: By their number of inputs.
        hits, misses: Inputs whose features were there, or not.
        failed: Inputs whose answer was an error.
        refused: Inputs that found no place in the queue.
        expired: Inputs that nobody waited for any more.
        answers: By task.
        no_number: Answers that were NaN or infinite and hence none, by task.
        seconds: Spent decoding, waiting, in forwards and in tasks.
    """

    inputs: int = 0
    forwards: int = 0
    batches: Counter[int] = field(default_factory=Counter)
    hits: int = 0
    misses: int = 0
    failed: int = 0
    refused: int = 0
    expired: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    no_number: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    _lock: Lock = field(default_factory=Lock, repr=False)

    def add(self, **numbers: Any) -> None:
        """Add to several at once: numbers, or counters by name."""
        with self._lock:
            for name, number in numbers.items():
                kept = getattr(self, name)
                if isinstance(kept, Counter):
                    kept.update(number)
                else:
                    setattr(self, name, kept + number)
