"""Pictures of accuracies: the part of the axis that is shown is told, and is never beyond 0 and 100 %."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from restuning.search import Comparison
from restuning.search.accuracy_axis import FEWEST_POINTS, choose_range, scale_accuracy
from restuning.search.sweep import Sweep
from restuning.task import Task
from restuning.training.run import Run

ROUNDING = 1e-9
"""Ends are whole numbers; only their difference is compared with the width."""


@given(st.lists(st.floats(0, 100), min_size=1, max_size=5))
def test_the_axis_holds_all_values_within_0_and_100_and_is_never_narrow(percents):
    low, high = choose_range(percents)
    assert 0 <= low <= min(percents)
    assert max(percents) <= high <= 100
    assert low == int(low)
    assert high == int(high)
    assert high - low >= FEWEST_POINTS - ROUNDING


@pytest.mark.parametrize("which", ["x", "y"])
@pytest.mark.parametrize("percents", [[100.0], [0.0, 0.4], [93.1, 100.0], [50.0], []])
def test_no_tick_stands_beyond_what_can_be(which, percents):
    axis = Figure().subplots()
    low, high = choose_range(percents) if percents else (0, 100)
    assert scale_accuracy(axis, percents, which) == f"from {low:g} to {high:g}"
    ticks = getattr(axis, f"get_{which}ticks")()
    assert len(ticks) > 1
    assert low <= min(ticks)
    assert max(ticks) <= high


def run(method, accuracy, memory):
    row = {"method": method, "test_accuracy": accuracy, "peak_memory_bytes": memory}
    row |= {"trainable_parameters": 1290, "tuner_parameters": 0, "seconds": 3.0, "seed": 0}
    return Run(method, Task(), Path(), row)


def texts(figure):
    return [text.get_text() for axis in figure.axes for text in axis.texts]


@pytest.fixture
def drawn(monkeypatch):
    """Figures that were saved."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))
    )
    return figures


def test_bars_start_at_zero_and_what_was_not_measured_is_no_zero(tmp_path, drawn):
    runs = (run("linear", 0.93, 2**20), run("ridge", None, None), run("res-tuning", 1.0, 2**22))
    Comparison(runs, tmp_path).draw(tmp_path / "a.png", "digits")
    assert Image.open(tmp_path / "a.png").size[0] > 1000
    (figure,) = drawn
    dots, *bars = figure.axes
    assert not dots.patches
    assert all(axis.get_ylim()[0] == 0 for axis in bars)
    assert texts(figure).count("not measured") == 2
    assert {"93.00", "100.00"} <= set(texts(figure))


def test_a_sweep_shows_every_seed_and_nothing_beyond_100(tmp_path, drawn):
    rows = [
        {"setting": {"lr": 0.01}, "val_accuracy": [1.0, 0.9], "mean": 0.95, "std": 0.07},
        {"setting": {"lr": 0.1}, "val_accuracy": [0.8], "mean": 0.8, "std": 0.0},
        {"setting": {"lr": 1.0}, "val_accuracy": [], "mean": None, "std": 0.0},
    ]
    Sweep({"settings": rows, "best": rows[0]}, tmp_path).draw(tmp_path / "a.png", "digits")
    (figure,) = drawn
    (axis,) = figure.axes
    drawn_at = {round(float(x), 6) for line in axis.lines for x in line.get_xdata()}
    assert {80.0, 90.0, 95.0, 100.0} <= drawn_at
    assert max(drawn_at) == 100.0
    assert texts(figure) == ["80.00", "95.00 chosen"]
