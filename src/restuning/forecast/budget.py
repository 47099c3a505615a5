"""Which method, form and batch size a memory budget allows."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from restuning._errors import ForecastError
from restuning.forecast.step import StepForecast

UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}

MOST = 65536
"""Batches above this are not looked for."""

MOST_FORECASTS = 5
"""Of a search for a batch; where memory is a straight line the first proposal is right."""


def parse_bytes(text: str) -> int:
    """`8GB` as 8,000,000,000, `8GiB` as 8,589,934,592; also K, M, T and plain bytes.

    Raises:
        ForecastError: It does not read so, or is less than one byte.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?I?)B?\s*", text.upper(), re.ASCII)
    unit = UNITS.get(match[2]) if match else None
    size = int(float(match[1]) * unit) if match and unit and len(match[1]) < 20 else 0
    if size < 1:
        raise ForecastError(
            "not an amount of memory", where=text, fix="write e.g. 8GB, 7.5GiB or 500MB"
        )
    return size


def largest_batch(
    forecast: Callable[[int], StepForecast], budget: int, *, first: StepForecast | None = None
) -> int:
    """The largest batch whose step fits a budget; 0 if not one input does.

    Memory is almost a straight line in the batch, so a line through two forecasts proposes and a
    forecast at the proposal decides: what is returned was forecast to fit.

    Args:
        forecast: Of a batch size.
        budget: Bytes for everything: weights, moments, the batch and the peak above them.
        first: A forecast that is there already.
    """
    # Nothing to search where one input alone does not fit.
    fits = forecast(1)
    if fits.total_bytes > budget:
        return 0
    last, over = first if first is not None and first.batch > 1 else forecast(32), MOST + 1
    for _ in range(MOST_FORECASTS):
        grown = max(1, last.total_bytes - fits.total_bytes)
        inputs = last.batch - fits.batch
        if last.total_bytes <= budget:
            fits = last
        else:
            over = last.batch
        # Where the line through the last two forecasts meets the budget.
        guess = fits.batch + (budget - fits.total_bytes) * inputs // grown
        guess = min(guess, over - 1)
        if guess <= fits.batch:
            break
        last = forecast(guess)
    return last.batch if last.total_bytes <= budget else fits.batch


@dataclass(frozen=True)
class Option:
    """One way to train: a method in one form.

    Attributes:
        method: Its name.
        form: "live", "checkpointing" (blocks are run again in backward) or "cached" (from stored
            features).
        reads: What a step reads of the backbone, in words.
        step: At the batch that was asked for.
        time_over_forward: Time of a step over that of one forward of the same batch.
        seconds: Of the whole run, building the store included; None without data.
        store_bytes: Of the store; None where there is none.
        largest_batch: That fits the budget; None without a budget.
    """

    method: str
    form: str
    reads: str
    step: StepForecast
    time_over_forward: float
    seconds: float | None = None
    store_bytes: int | None = None
    largest_batch: int | None = None


ACCURACY = ("res-tuning", "res-tuning-bypass", "linear")
"""From most to least accurate on VTAB-1K (arXiv 2310.19859, Tables 4 and 5). Full fine-tuning costs
the most memory and stands behind res-tuning there, so it is not recommended."""

FORMS = ("cached", "live", "checkpointing")
"""From fastest to slowest; all three train the same."""


SMALLEST = 8
"""Inputs of a piece below which a form that fits more of them is preferred."""


@dataclass(frozen=True)
class Recommendation:
    """What to take, and in words why."""

    option: Option
    batch: int
    why: str


def recommend(options: Sequence[Option], batch: int) -> Recommendation | None:
    """The most accurate method that fits, in its fastest form; None if nothing fits.

    A method fits if the batch asked for does, or a smaller one that `--accumulate` makes up for:
    a step in pieces is the same step and costs no more flops, where checkpointing costs one forward
    more. So pieces come first, unless they are too small to keep a processor busy.

    Args:
        options: With `largest_batch` where there is a budget.
        batch: Asked for.
    """
    order = {m: i for i, m in enumerate(ACCURACY)}
    # A name may end in settings, as in `res-tuning[mha=prompt]`. Where no method of the table is
    # among them, all are ranked alike and the form decides.
    known = [o for o in options if o.method.partition("[")[0] in order] or list(options)

    def rank(option: Option) -> tuple:
        most = batch if option.largest_batch is None else option.largest_batch
        form = FORMS.index(option.form)
        small = most < min(batch, SMALLEST)
        return order.get(option.method.partition("[")[0], 0), small, form, -most

    fitting = [o for o in known if o.largest_batch is None or o.largest_batch >= 1]
    if not fitting:
        return None
    best = min(fitting, key=rank)
    most = batch if best.largest_batch is None else min(batch, best.largest_batch)
    why = f"the most accurate of {len(fitting)} ways that fit, in its fastest form"
    if most < batch:
        pieces = -(-batch // most)
        why += (
            f"; batch {batch} in {pieces} pieces of {-(-batch // pieces)} (--accumulate {pieces})"
        )
    return Recommendation(best, most, why)
