"""What answers to a split are worth: figures, figures by output, pictures and the worst mistakes, as plain records.

Who shows them asks for what stands here and not for the kind of problem.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

WORST = 24
"""Mistakes that are kept by number, the worst first."""


@dataclass(frozen=True)
class Breakdown:
    """Figures of each output by itself.

    Attributes:
        names: Of the outputs.
        columns: By title, a value an output; None where it is not defined.
        shares: Titles of columns that are read in percent.
        noun: What is named, in the plural, where that is not what outputs stand for.
        colours: Of each in pictures, as `#rrggbb`; empty where there are none.
    """

    names: Sequence[str]
    columns: Mapping[str, Sequence[float | int | None]]
    shares: Sequence[str] = ()
    noun: str = ""
    colours: Sequence[str] = ()

    def rows(self) -> list[dict[str, Any]]:
        """A row an output: its name, then its figures by title."""
        titles = list(self.columns)
        each = zip(self.names, *self.columns.values(), strict=True)
        return [{"name": name, **dict(zip(titles, own, strict=True))} for name, *own in each]


@dataclass(frozen=True)
class Confusion:
    """How often examples of one class (rows) were answered with another (columns), `C C`.

    Attributes:
        counts: `C C`.
        labels: Names of the classes.
        unit: What is counted, in the plural.
    """

    counts: Tensor
    labels: Sequence[str]
    unit: str = "times"

    def pairs(self, most: int = 10) -> list[tuple[str, str, int, int]]:
        """True class, answered class, how often, and of how many, the most frequent first."""
        off = self.counts.clone()
        off.fill_diagonal_(0)
        flat = off.flatten()
        order = flat.argsort(descending=True, stable=True)[:most].tolist()
        names, sums = list(self.labels), self.counts.sum(1).tolist()
        places = [(*divmod(n, len(names)), int(flat[n])) for n in order if flat[n] > 0]
        return [(names[y], names[k], times, sums[y]) for y, k, times in places]


@dataclass(frozen=True)
class Reliability:
    """Of answers told with about one probability how many are right; bins that have none are left out.

    Attributes:
        confidence: Mean probability that was told in each bin.
        right: Share of right answers there.
        counts: Answers in it.
    """

    confidence: Sequence[float]
    right: Sequence[float]
    counts: Sequence[int]


@dataclass(frozen=True)
class Scatter:
    """A number as it is and as it was answered.

    Attributes:
        name: Of the number.
        truth, answers: One an example, in units.
        error: How far off answers were on rows left out (root of the mean square); None where nobody knows.
    """

    name: str
    truth: Sequence[float]
    answers: Sequence[float]
    error: float | None = None


@dataclass(frozen=True)
class Pixels:
    """A picture that is one already, `h w 3` in bytes, such as a mask over an image.

    Attributes:
        title: In a few words.
        told: What is to be seen, for who does not see it.
        pixels: Of the picture.
    """

    title: str
    told: str
    pixels: Tensor


Picture = Confusion | Reliability | Scatter | Pixels


@dataclass(frozen=True)
class Mistake:
    """An answer that was wrong, or far off.

    Attributes:
        row: Of the split.
        told: What was answered, in words.
        truth: What it should have been.
        loss: Of this answer.
        maps: Truth and answer as pictures, where they lie on the input.
    """

    row: int
    told: str
    truth: str
    loss: float
    maps: Sequence[Pixels] = ()


@dataclass(frozen=True)
class Judged:
    """What answers to a split are worth.

    Attributes:
        count: Answers that were judged: examples, or tokens.
        figures: By name, in torchmetrics' words; None where one is not defined.
        constant: The same of the best answer that is always the same; empty where the problem knows none.
        shares: Names of figures that are read in percent.
        breakdown: Figures of each output; None where there is nothing to tell apart.
        pictures: In the order they are shown.
        worst: The worst mistakes first, `WORST` at most.
        wrong: How many answers are mistakes; None where answers are near or far and not right or wrong.
        rows: Of every example what was true and what was answered, a column each, in order.
    """

    count: int
    figures: Mapping[str, float | None]
    constant: Mapping[str, float | None] = field(default_factory=dict)
    shares: Sequence[str] = ()
    breakdown: Breakdown | None = None
    pictures: Sequence[Picture] = ()
    worst: Sequence[Mistake] = ()
    wrong: int | None = None
    rows: Sequence[Mapping[str, Any]] = ()
