"""What a whole grid of runs costs: every image through the backbone once, every arm on features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class BankRates:
    """Times that were measured once on this machine (`training.timing`).

    Attributes:
        forward_seconds: One image through the backbone, reading and decoding included.
        step_seconds: One step of a bank of `arms` arms from stored features.
        eval_seconds: One image through such a bank.
        arms: Of that bank.
    """

    forward_seconds: float
    step_seconds: float
    eval_seconds: float
    arms: int


@dataclass(frozen=True)
class GridForecast:
    """Seconds of a grid, by what they go to.

    Attributes:
        features: Building the stores.
        search: Training all arms, and evaluating each after every epoch.
        final: Training the chosen setting again, and testing it.
        tasks: Data sets.
        arms: Runs of each.
    """

    features: float
    search: float
    final: float
    tasks: int
    arms: int

    @property
    def seconds(self) -> float:
        """Of everything."""
        return self.features + self.search + self.final

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "seconds": self.seconds}


def forecast_grid(
    rates: BankRates,
    splits: Mapping[str, int],
    *,
    tasks: int,
    arms: int,
    epochs: int,
    batch: int,
    finals: int = 0,
    single: BankRates | None = None,
) -> GridForecast:
    """The cost of `tasks` sweeps of `arms` runs each, from times measured once.

    Args:
        rates: Of the bank that searches.
        splits: Images by split ("train", "val", "test") of one task.
        tasks: Data sets of this size.
        arms: Settings times seeds.
        epochs: Of each run.
        batch: Images of a step.
        finals: Runs of the chosen setting on train and val.
        single: Rates of the bank of the final runs; None scales those of the search, which is
            too much where a larger bank is no slower.
    """
    train, val, test = (splits.get(k, 0) for k in ("train", "val", "test"))
    # Each image passes the backbone once, however many arms train on its features.
    forwards = train + val + test
    # A sweep trains as many arms at once as the bank that was measured.
    banks = arms / rates.arms
    steps = -(-train // batch) * epochs
    search = banks * (steps * rates.step_seconds + epochs * val * rates.eval_seconds)
    last = single or rates
    # The trained arms of the final runs are tested one by one.
    final = (
        finals
        / last.arms
        * (-(-(train + val) // batch) * epochs * last.step_seconds + test * last.eval_seconds)
    )
    return GridForecast(
        tasks * forwards * rates.forward_seconds, tasks * search, tasks * final, tasks, arms
    )
