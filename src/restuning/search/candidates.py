"""The methods that `auto` tries, cheapest first, and for how many epochs each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from restuning.training.defaults import find_default

MORE = 0.4
"""Share of a trial's epochs that its final run makes, from the trial's weights and on both splits.

A trial that is cut short understates what needs long, so trials are whole runs. A second whole run
would double the cost. With this the choice and its run take 1.4 to 2.0 runs of LoRA
(`recipes/shared_tasks/auto`).
"""

SHRINK = 0.25
"""Factor on all weights of a trial, where the final run goes on from them.

Weights trained to the end learn badly from examples that come later; shrunk ones keep their direction
and learn again (Ash and Adams 2020). For tuners that start as no change it is also a step back towards the
backbone (as Wortsman et al. 2022 do at the end). Chosen on the validation split, with res-tuning trained
on 640 images for 10 epochs and then for 4 on 800 at the same rate, seed 0: on cifar100 51.0 % without (at
0.4 of the rate), 56.5 at 0.5, 58.0 at 0.25, and 48.5 for 10 epochs on 800 anew; on caltech101 76.5, 79.5
and 82.5, and 75.0 anew (`recipes/shared_tasks/going_on.py`).
"""

DETACHED_TIMES = 4
"""Epochs of a detached method for one inside the backbone: from stored features they cost less than
that one even for the dearest of them (ViT-Ti at 112 px: 0.14 s a step to 0.91,
`recipes/shared_tasks`), and it goes on learning (62.1 to 75.1 % there)."""


@dataclass(frozen=True)
class Candidate:
    """A method that may be chosen.

    Attributes:
        method: Name of the method.
        rates: Highest learning rates; those of a detached method are tried in parallel.
        times: Its epochs for each one of a method inside the backbone.
        warm_start: Whether its final run starts from the weights of its trial (`MORE`) and not anew, which is
            for those whose epochs are dear.
        on_request: Whether it is tried only where a budget of time is given: what trains through the backbone
            takes many times as long as all others together.
    """

    method: str
    rates: tuple[float, ...]
    times: int
    warm_start: bool = False
    on_request: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As JSON, under the names that folders of choices have had from the start."""
        rate = find_default(self.method).lambda_rate
        return {
            "method": self.method,
            "rates": list(self.rates),
            "times": self.times,
            "goes_on": self.warm_start,
            # Only where it is not 1: others are what they always were.
            **({} if rate == 1 else {"lambda_rate": rate}),
        }

    def trial_epochs(self, inside: int) -> int:
        """Epochs of its trial, where a method inside the backbone is given `inside`."""
        return inside * self.times

    def epochs(self, inside: int) -> int:
        """Epochs of its final run."""
        epochs = self.trial_epochs(inside)
        return max(1, round(MORE * epochs)) if self.warm_start else epochs


CANDIDATES = (
    Candidate("linear", (5e-3, 3e-2), DETACHED_TIMES),
    Candidate("res-tuning-bypass", (5e-3, 2e-2), DETACHED_TIMES),
    Candidate("ridge", (1e-3,), 1),
    Candidate("ensemble", (5e-3,), 3),
    Candidate("res-tuning", (5e-3,), 1, warm_start=True, on_request=True),
)
"""Cheapest first. Rates are those of `recipes/shared_tasks`: two where parallel runs cost next to nothing, one
where that rate was chosen on the validation splits of several tasks. What is solved in closed form
takes no epochs. An ensemble has a mixing bypass in it, which is not tried alone."""

NOT_ASKED = "trains through the backbone, which takes long: give a budget of time (--minutes) to have it tried"
