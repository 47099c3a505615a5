"""How sure a comparison is: paired bootstrap over test images, and ranks over tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from restuning._errors import require
from restuning.bench.report.summary import Summary

DRAWS = 2000
"""Resamples of the bootstrap: the ends of a 95 % interval then wander by about a tenth of its width."""

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A difference of means and where it lies in 95 of 100 resamples."""

    mean: float
    low: float
    high: float

    @property
    def sure(self) -> bool:
        """Whether zero lies outside the interval."""
        return self.low > 0 or self.high < 0


def paired_bootstrap(
    summary: Summary, labels: Sequence[str], reference: str, tasks: Sequence[str], seed: int = 0
) -> dict[str, Interval]:
    """Difference of mean accuracy over tasks to a reference method, with its interval.

    In every draw the test images of each task are resampled, the same images for all methods; a
    method's answer to an image is its share of right answers over seeds. Tasks are not resampled:
    the interval is about these tasks.

    Args:
        summary: Of a grid.
        labels: To compare; all must have all tasks.
        reference: The method they are compared with.
        tasks: Averaged over.
        seed: Of the draws.
    """
    # A seed: a report made twice says the same.
    rng = np.random.default_rng(seed)
    names = list(dict.fromkeys([reference, *labels]))
    resampled, means = np.zeros((DRAWS, len(names))), np.zeros(len(names))
    for task in tasks:
        hits = np.stack([summary.cells[task, name].hits for name in names], 1)
        count = len(hits)
        # How often each image is drawn, as shares: one product in place of DRAWS resamples.
        weights = rng.multinomial(count, np.full(count, 1 / count), DRAWS) / count
        # Every task counts once, however many images it has.
        resampled += weights @ hits / len(tasks)
        means += hits.mean(0) / len(tasks)
    tail = 100 * (1 - LEVEL) / 2
    intervals = {}
    for place, name in enumerate(names[1:], 1):
        # Paired: both were drawn on the same images, so hard images cancel.
        difference = resampled[:, place] - resampled[:, 0]
        low, high = np.percentile(difference, [tail, 100 - tail])
        intervals[name] = Interval(float(means[place] - means[0]), float(low), float(high))
    return intervals


def mean_ranks(summary: Summary, labels: Sequence[str], tasks: Sequence[str]) -> dict[str, float]:
    """Rank of every method (1 is best, ties share), averaged over tasks."""
    table = np.array([[summary.cells[t, n].mean for n in labels] for t in tasks])
    this, other = table[:, :, None], table[:, None, :]
    # Those above it, and half of those that are level with it (with itself: hence the other half).
    ranks = 0.5 + (other > this).sum(2) + (other == this).sum(2) / 2
    return dict(zip(labels, ranks.mean(0).tolist(), strict=True))


def critical_difference(methods: int, tasks: int, alpha: float = 0.05) -> float:
    """Nemenyi's: mean ranks that are further apart differ at level alpha (Demsar 2006, eq. 5).

    Args:
        methods: Compared, k.
        tasks: Compared on, N.
        alpha: Level.

    Raises:
        MissingExtraError: scipy is not installed.
    """
    studentized_range = require(
        "scipy.stats", "bench", "the critical difference of mean ranks"
    ).studentized_range
    # Infinite degrees of freedom: Nemenyi's limit for ranks (Demsar 2006, Table 5).
    q = float(studentized_range.ppf(1 - alpha, methods, np.inf)) / math.sqrt(2)
    return q * math.sqrt(methods * (methods + 1) / (6 * tasks))
