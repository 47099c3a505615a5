"""What is tried, cheapest first, and for how long."""

from __future__ import annotations

from dataclasses import dataclass

MORE = 0.3
"""Of a trial's epochs, made on both splits from its weights in place of a whole run anew.

A trial that is cut short understates what needs long (on cifar100 res-tuning has 40.5 % on validation
after four epochs and 52.5 % on test after ten), so trials are whole runs. A second whole run
would double the cost; the validation split is a fifth of both, and passed over three times in ten it
is learned. With it the choice and its run stay below two runs of LoRA (`recipes/shared_tasks/auto`).
"""

DETACHED_TIMES = 4
"""Epochs of a detached method for one inside the backbone: from stored features they cost less than
that one even for the dearest of them (ViT-Ti at 112 px: 0.14 s a step to 0.91,
`recipes/shared_tasks`), and it goes on learning (62.1 to 75.1 % there)."""

LOWER = 0.4
"""Highest rate of going on, over that of the trial: weights that are learned already move less (tried with
`mixing-bypass` on 640 training images, then on 800, at 1 and 0.4: 68.0 and 73.5 % on validation for
`count_like`, 92.0 and 92.5 for `dsprites_like_loc`, one seed)."""


@dataclass(frozen=True)
class Candidate:
    """A method that may be chosen.

    Attributes:
        method: Its name.
        rates: Highest learning rates; those of a detached method are arms of one bank.
        times: Its epochs over those of a method inside the backbone.
        goes_on: Whether its final run starts from the weights of its trial (`MORE`) and not anew, which is
            for those whose epochs are dear.
    """

    method: str
    rates: tuple[float, ...]
    times: int
    goes_on: bool = False

    def trial_epochs(self, inside: int) -> int:
        """Of its trial, where one inside the backbone makes so many."""
        return inside * self.times

    def epochs(self, inside: int) -> int:
        """Of its final run."""
        whole = self.trial_epochs(inside)
        return max(1, round(MORE * whole)) if self.goes_on else whole


CANDIDATES = (
    Candidate("linear", (5e-3, 3e-2), DETACHED_TIMES),
    Candidate("res-tuning-bypass", (5e-3, 2e-2), DETACHED_TIMES),
    Candidate("ridge", (1e-3,), 1),
    Candidate("mixing-bypass", (5e-3,), DETACHED_TIMES, goes_on=True),
    Candidate("res-tuning", (5e-3,), 1, goes_on=True),
)
"""Cheapest first. Rates are those of `recipes/shared_tasks`: two where arms cost next to nothing, one
where that rate was chosen on the validation splits of several tasks. What is solved in closed form
needs few epochs more."""
