"""The rule of a choice as numbers, and what a budget says."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from restuning import RestuningError
from restuning._durations import tell_time
from restuning.search import Budget, format_bytes, rule

PRINTED = 0.005
"""The docstring of `rule.find_highest` gives two decimals."""
accuracies = st.floats(0, 1)


def row(accuracy, noise=0.03, form="stored", status="tried"):
    return {"val_accuracy": accuracy, "standard_error": noise, "form": form, "status": status}


def below(x):
    """Of a standard normal."""
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def test_the_highest_is_taken_and_of_equals_the_cheapest():
    rows = [row(0.5), {"val_accuracy": None}, row(0.7), row(0.7), {"status": "left out"}]
    assert rule.find_highest(rows) is rows[2]
    assert rule.find_highest([{}]) is rule.choose([{}]) is None


@pytest.mark.parametrize(
    ("accuracy", "loss", "status", "wins"),
    [
        (0.78, 0.5, "tried", True),
        (0.78, 0.7, "tried", False),
        (0.70, 0.1, "tried", False),
        (0.78, 0.5, "stopped", False),
    ],
)
def test_what_accuracy_does_not_tell_apart_cross_entropy_does(accuracy, loss, status, wins):
    top = row(0.8) | {"cross_entropy": 0.6}
    other = row(accuracy, status=status) | {"cross_entropy": loss}
    for rows in ([top, other], [other, top]):
        assert rule.choose(rows) is (other if wins else top)


def test_with_many_examples_accuracy_decides_alone():
    few, many = 0.03, 0.0003
    for noise, wins in ((few, True), (many, False)):
        rows = [
            row(0.80, noise) | {"cross_entropy": 0.6},
            row(0.79, noise) | {"cross_entropy": 0.5},
        ]
        assert (rule.choose(rows) is rows[1]) == wins


@pytest.mark.parametrize(("margin", "printed"), [(0.0, 0.17), (1.0, 0.51)])
def test_the_docstring_prints_what_preferring_the_cheaper_loses(margin, printed):
    """A method better by d is passed over with chance P(noise < margin - d); the loss is d times that."""
    loss = max(d * below(margin - d) for d in np.linspace(0, 4, 4001))
    assert loss == pytest.approx(printed, abs=PRINTED)
    assert f"{printed} s" in rule.find_highest.__doc__


@given(accuracies, st.integers(1, 10_000))
def test_a_standard_error_is_never_zero_and_shrinks_with_examples(p, n):
    assert 0 < rule.standard_error(p, n) <= 0.5
    assert rule.standard_error(p, 4 * n + 10) < rule.standard_error(p, n)


def test_a_standard_error_is_that_of_a_share():
    assert rule.standard_error(0.5, 100_000) == pytest.approx(0.5 / math.sqrt(100_000), rel=1e-4)


@given(st.lists(accuracies, min_size=1, max_size=9), st.integers(1, 20), st.integers(2, 500))
def test_what_is_ahead_is_never_lost(curve, left, count):
    assert not rule.is_lost(curve, len(curve) + left, curve[-1], count)


@given(st.lists(accuracies, min_size=2, max_size=9), st.integers(1, 20), accuracies, accuracies)
def test_a_higher_mark_loses_no_less(curve, left, one, other):
    low, high = sorted((one, other))
    epochs = len(curve) + left
    # The doubt shrinks towards both ends, never faster than the mark rises.
    if high - low > 0.01 and rule.is_lost(curve, epochs, low, 200):
        assert rule.is_lost(curve, epochs, high, 200)


def test_a_trial_is_lost_only_from_its_middle_on_and_beyond_doubt():
    assert not rule.is_lost([0.05], 2, 0.9, 200)
    assert not rule.is_lost([0.05, 0.05], 16, 0.9, 200), "a curve may begin flat"
    assert rule.is_lost([0.05] * 8, 16, 0.9, 200)
    assert rule.is_lost([0.05, 0.10], 4, 0.9, 200)
    assert not rule.is_lost([0.05, 0.40], 4, 0.9, 200), "at this pace it ends at 110 %"
    assert not rule.is_lost([0.70, 0.70], 4, 0.75, 200), "within the noise of 200 examples"
    assert rule.is_lost([0.70, 0.70], 4, 0.75, 20_000)


def test_reasons_say_how_far_behind_and_whether_that_is_noise():
    taken, near, far, equal = row(0.8), row(0.78), row(0.5), row(0.8)
    assert rule.explain(taken, taken) == "taken"
    assert (
        rule.explain(row(0.83), taken) == "3.0 points ahead, within one standard error, fits worse"
    )
    assert rule.explain(near, taken) == "2.0 points behind, within one standard error"
    assert rule.explain(far, taken) == "30.0 points behind"
    assert rule.explain(equal, taken) == "equal"


def test_a_budget_is_read_as_the_planner_reads_it():
    assert Budget.of("2GiB", 10) == Budget(2 * 2**30, 600)
    assert Budget.of(None, None) == Budget(None, None)
    assert Budget(2**30).refuses_memory(2**30) == "" == Budget().refuses_memory(2**60)
    words = Budget(2 * 2**30).refuses_memory(int(3.1 * 2**30))
    assert words == "needs 3.1 GiB of memory, budget 2.0 GiB"
    assert Budget(None, 600).refuses_time(840) == "needs 14 min, budget 10 min"
    assert Budget(2**30).refuses_memory(None) == "", "what is not known is tried"


@pytest.mark.parametrize(
    ("memory", "minutes"),
    [
        ("much", None),
        ("0GB", None),
        (None, 0),
        (None, -1.0),
        (None, float("nan")),
        (None, math.inf),
    ],
)
def test_no_budget_is_refused_in_words(memory, minutes):
    with pytest.raises(RestuningError, match="not an? "):
        Budget.of(memory, minutes)


@given(st.text(max_size=12), st.floats(allow_nan=True, allow_infinity=True))
def test_whatever_is_written_is_read_or_refused(memory, minutes):
    try:
        budget = Budget.of(memory, minutes)
    except RestuningError:
        return
    assert budget.memory >= 1
    assert budget.seconds > 0


@given(st.integers(1, 2**50), st.floats(0.01, 1e6))
def test_amounts_are_told_shortly(size, seconds):
    assert len(format_bytes(size)) < 14
    assert len(tell_time(seconds)) < 12


def test_a_duration_is_told_in_the_unit_that_fits():
    told = {0.0322: "32 ms", 14: "14.0 s", 100: "1.7 min", 840: "14 min", 3599: "1 h 00 min"}
    told |= {11_100: "3 h 05 min", 43_560: "12 h"}
    assert {seconds: tell_time(seconds) for seconds in told} == told
