"""The temperature that is fitted to held-out answers, and the error of probabilities."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Subset

from restuning import FitSettings, Tuned, evaluate, fit, load_backbone, load_data, methods
from restuning.task.task import OCTAVES
from restuning.training import Calibration, calibrate, calibration_error, fit_temperature
from restuning.training.calibrate import STEPS, calibrated_loss
from restuning.training.calibrate import judge as judge_answers

KNOWN = 0.05
"""Of a temperature, from 4,000 answers drawn at it: three times what ten draws of them scatter."""
STEP = 2 ** (1 / STEPS) - 1
"""Temperatures are told apart to a step."""
ROUNDED = 2e-3
"""Of a loss, from one grid of temperatures to another that is not its multiple."""


def answers(n, classes, loudness, seed=0):
    """Logits whose softmax is what labels are drawn from, told `loudness` times as loud."""
    draw = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, classes, generator=draw)
    labels = torch.multinomial(logits.softmax(1), 1, generator=draw)[:, 0]
    return loudness * logits, labels


def all_right(n, classes=5):
    draw = torch.Generator().manual_seed(n)
    labels = torch.randint(0, classes, (n,), generator=draw)
    return 4 * F.one_hot(labels, classes) + 0.3 * torch.randn(n, classes, generator=draw), labels


@pytest.mark.parametrize("classes", [2, 10, 100])
@pytest.mark.parametrize("loudness", [0.05, 0.5, 1.0, 3.0, 40.0])
def test_a_known_temperature_is_found_again(loudness, classes):
    found = fit_temperature(*answers(4000, classes, loudness))
    assert found == pytest.approx(loudness, rel=KNOWN)


@given(st.integers(0, 10**6), st.integers(-4, 4))
@settings(deadline=None)
def test_louder_logits_have_a_higher_temperature_and_the_same_probabilities(seed, doublings):
    logits, labels = answers(60, 3, 1.0, seed)
    once, again = fit_temperature(logits, labels), fit_temperature(2.0**doublings * logits, labels)
    assert again == pytest.approx(2.0**doublings * once, rel=STEP / 10)


@given(st.integers(0, 10**6), st.integers(2, 200))
@settings(deadline=None)
def test_a_temperature_stays_in_the_range_that_a_task_file_takes(seed, n):
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, 4, generator=draw) * 10 ** (8 * torch.rand(1, generator=draw) - 4)
    found = fit_temperature(logits, torch.randint(0, 4, (n,), generator=draw))
    assert 2.0**-OCTAVES <= found <= 2.0**OCTAVES


@pytest.mark.parametrize("n", [10, 100, 1000])
def test_answers_that_are_all_right_are_not_told_as_certain(n):
    logits, labels = all_right(n)
    confidence = (logits / fit_temperature(logits, labels)).softmax(1).amax(1)
    # Where half of one more example is wrong, nobody is surer than that on average.
    wrong = 0.5 / (n + 1)
    assert wrong / 2 < 1 - float(confidence.double().mean()) < 2 * wrong


def test_one_right_answer_more_makes_no_answer_less_sure():
    surer = [1 / fit_temperature(*(part[:n] for part in all_right(400))) for n in (25, 100, 400)]
    assert surer == sorted(surer)


@pytest.mark.parametrize(
    "logits",
    [torch.zeros(6, 3), torch.randn(6, 1), torch.full((6, 3), torch.nan), 7 * torch.ones(6, 2)],
)
def test_logits_that_say_nothing_keep_a_temperature_of_one(logits):
    assert fit_temperature(logits, torch.zeros(6, dtype=torch.long)) == 1.0


def test_answers_that_are_wrong_more_often_than_chance_are_told_as_a_guess():
    logits, labels = all_right(100)
    found = fit_temperature(-logits, labels)
    assert (-logits / found).softmax(1).amax() < 0.3


@given(st.integers(0, 10**6), st.integers(-8, 8))
@settings(deadline=None)
def test_loudness_changes_no_calibrated_loss(seed, quarters):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (60,), generator=draw)
    logits = torch.randn(60, 3, generator=draw) + 2 * F.one_hot(labels, 3)
    loss = calibrated_loss(logits, labels)
    assert loss <= float(F.cross_entropy(logits, labels))
    assert calibrated_loss(2 ** (quarters / 4) * logits, labels) == pytest.approx(loss, rel=ROUNDED)


def test_the_error_is_that_of_its_formula():
    # Two answers at 0.9 of which one is right, two at 0.6 of which both are, and one that is sure.
    confidence = torch.tensor([0.9, 0.9, 0.6, 0.6, 1.0])
    right = torch.tensor([True, False, True, True, True])
    assert calibration_error(confidence, right) == pytest.approx((2 * 0.4 + 2 * 0.4) / 5)


@given(st.integers(0, 10**6))
@settings(deadline=None)
def test_the_error_is_a_share_and_zero_of_certain_right_answers(seed):
    logits, labels = answers(50, 4, 2.0, seed)
    right = logits.argmax(1) == labels
    assert 0 <= calibration_error(logits.softmax(1).amax(1), right) <= 1
    assert calibration_error(torch.ones(50), torch.ones(50, dtype=torch.bool)) == 0
    assert calibration_error(torch.ones(50), torch.zeros(50, dtype=torch.bool)) == 1


def test_loud_answers_are_nearer_to_what_they_say_after_it():
    found = judge_answers(torch.nn.Module(), *answers(2000, 10, 4.0))
    assert found.on == "validation"
    assert found.ece < found.ece_uncalibrated / 3


def test_answers_that_are_no_numbers_have_no_error_and_no_temperature():
    logits, labels = answers(50, 3, 1.0)
    logits[3] = torch.nan
    assert judge_answers(torch.nn.Module(), logits, labels) == Calibration(1.0, "validation")


def test_a_calibration_is_read_as_it_was_written():
    found = Calibration(2.5, "validation", 0.01, 0.2)
    assert Calibration.from_dict({"method": "linear", **found.to_dict()}) == found
    assert Calibration.from_dict({"method": "linear"}) == Calibration()
    assert "20.0%" in found.describe()
    assert "error" not in replace(found, ece=None).describe()


@pytest.fixture(scope="module")
def world():
    backbone = load_backbone("restuning-tiny")
    data = load_data("digits", backbone)
    train, val = Subset(data.train, range(96)), Subset(data.val, range(48))
    return backbone.host(), replace(data, train=train, val=val)


def tuned_on(world, out, method="linear", epochs=2):
    host, data = world
    torch.manual_seed(0)
    tuned = Tuned(host, methods.build(method, host, num_classes=data.num_classes))
    how = {"settings": FitSettings(epochs=epochs, lr=5e-2), "out": out, "progress": False}
    return tuned, lambda: fit(tuned, data.train, data.val, **how)


def test_a_task_is_calibrated_by_one_call_and_its_logits_are_what_they_were(world, tmp_path):
    tuned, run = tuned_on(world, tmp_path)
    run()
    before = evaluate(tuned, world[1].val)
    found = calibrate(tuned, world[1].val)
    assert tuned.task.temperature == found.temperature != 1
    assert evaluate(tuned, world[1].val) == before


def test_training_on_forgets_a_temperature_that_was_fitted_to_other_weights(world, tmp_path):
    tuned, run = tuned_on(world, tmp_path)
    for _ in range(2):
        tuned.task.temperature = 3.0
        run()
        assert tuned.task.temperature == 1


def test_what_scales_its_answers_itself_keeps_them(world, tmp_path):
    tuned, run = tuned_on(world, tmp_path, "ridge", epochs=1)
    run()
    found = calibrate(tuned, world[1].val)
    assert (found.temperature, found.on) == (1.0, "rows left out of training")
    assert found.ece == found.ece_uncalibrated
    assert math.isfinite(found.ece)
