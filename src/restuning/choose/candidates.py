"""What is tried, cheapest first, and how far."""

from __future__ import annotations

from dataclasses import dataclass

SHARE = 0.4
"""Of a final run's epochs that a trial makes.

The same share for all: a method that is shown nearer to its end than another looks better than it
is. So much that a trial inside the backbone, the detached ones and a final run inside stay below the
cost of two runs of LoRA (`recipes/shared_tasks/auto`): 0.5 would be just at it.
"""

DETACHED_TIMES = 4
"""Epochs of a detached method for one inside the backbone: from stored features they cost less than
that one even for the dearest of them (ViT-Ti at 112 px: 0.14 s a step to 0.91,
`recipes/shared_tasks`), and it goes on learning (62.1 to 75.1 % there)."""


@dataclass(frozen=True)
class Candidate:
    """A method that may be chosen.

    Attributes:
        method: Its name.
        rates: Highest learning rates; those of a detached method are arms of one bank.
        times: Its epochs over those of a method inside the backbone.
    """

    method: str
    rates: tuple[float, ...]
    times: int

    def epochs(self, inside: int) -> int:
        """Of its final run, where a method inside the backbone has so many."""
        return inside * self.times

    def trial_epochs(self, inside: int) -> int:
        """Of its trial."""
        return max(1, round(SHARE * self.epochs(inside)))


CANDIDATES = (
    Candidate("linear", (5e-3, 3e-2), DETACHED_TIMES),
    Candidate("res-tuning-bypass", (5e-3, 2e-2), DETACHED_TIMES),
    Candidate("ridge", (1e-3,), 1),
    Candidate("mixing-bypass", (5e-3,), DETACHED_TIMES),
    Candidate("res-tuning", (5e-3,), 1),
)
"""Cheapest first. Rates are those of `recipes/shared_tasks`: two where arms cost next to nothing, one
where that rate was chosen on the validation splits of several tasks. What is solved in closed form
needs few epochs more."""
