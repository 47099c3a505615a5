"""Training with a closed-form classifier: from a store, alone, in arms, and killed half way."""

import pytest
import torch

import restuning
from restuning import FitSettings, Host, methods
from restuning.data import load_data
from restuning.features import Cached, StoredFeatures, StoreOptions, open_or_build
from restuning.training import evaluate, fit
from restuning.training.arms import train_arms
from restuning.training.closed_form import WithAnswers, solve_closed_form

ALONE_TOLERANCE = 1e-5
"""Stacked products round elsewhere than single ones."""
CLASSES, ROWS = 10, 150


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    backbone = restuning.load_backbone("restuning-tiny")
    host = Host(backbone.model, *backbone.example)
    data = load_data("digits", backbone)
    for part in ("train", "val", "test"):
        setattr(data, part, torch.utils.data.Subset(getattr(data, part), range(ROWS)))
    needs = made(host).needs(host.readout_rule)
    kept = open_or_build(
        host, backbone, data, needs, StoreOptions(tmp_path_factory.mktemp("stores"), views=2)
    )
    return host, data, kept


def made(host):
    torch.manual_seed(0)
    return methods.build("ridge", host, CLASSES)


def test_it_starts_as_the_solution_which_reads_images_it_has_not_seen(world):
    host, data, kept = world
    task = made(host)
    tuned = Cached(host, task, kept.store)
    train = solve_closed_form([task], kept.data(data, final=False).train)
    assert isinstance(train, WithAnswers)
    right = evaluate(tuned, kept.data(data, final=False).test, 64, lambda batch: batch)
    # Ten digits: chance is a tenth.
    assert right["accuracy"] > 0.5


def test_rows_carry_the_answer_they_would_have_had_if_left_out(world):
    host, data, kept = world
    task = made(host)
    plain = kept.data(data, final=False).train
    train = solve_closed_form([task], plain)
    name = task.side.name
    rows = [5, 0, 149]
    taps, labels = train.gather(rows, [0, 1, 0])
    assert torch.equal(labels, plain.labels[rows])
    assert torch.equal(taps[name], train.answers[name][rows])
    assert torch.equal(train[5][0][name], taps[name][0])
    assert not torch.allclose(taps[name], task.side({n: t for n, t in taps.items() if n != name}))
    # Left out, a row is answered without its label: other labels of it change nothing there.
    other = StoredFeatures(kept.store, ["train"], 2)
    other.labels = other.labels.clone()
    other.labels[5] = (other.labels[5] + 1) % CLASSES
    again = solve_closed_form([made(host)], other)
    ratio = again.answers[name][5] / train.answers[name][5]
    # Up to the one scale that all rows share.
    assert float((ratio / ratio.median() - 1).abs().max()) < 1e-3


def test_an_arm_with_a_solution_ends_as_its_run_alone_would(world, tmp_path):
    host, data, kept = world
    fed = kept.data(data, final=False)
    each = [FitSettings(lr=lr, epochs=2, batch_size=32) for lr in (1e-3, 3e-3)]
    arms = train_arms(host, [made(host) for _ in each], each, fed.train, fed.val)
    for number, (own, arm) in enumerate(zip(each, arms, strict=True)):
        task = made(host)
        train = solve_closed_form([task], fed.train)
        fit(
            Cached(host, task, kept.store),
            train,
            settings=own,
            out=tmp_path / str(number),
            collate=fed.collate,
            progress=False,
        )
        for name, value in task.state_dict().items():
            torch.testing.assert_close(
                arm.task.state_dict()[name], value, atol=ALONE_TOLERANCE, rtol=ALONE_TOLERANCE
            )


def test_the_same_rows_give_the_same_solution_so_a_killed_run_goes_on(world):
    host, data, kept = world
    fed = kept.data(data, final=False)
    one, other = made(host), made(host)
    first = solve_closed_form([one], fed.train)
    second = solve_closed_form([other, made(host)], fed.train)
    assert torch.equal(one.side.weight, other.side.weight)
    assert torch.equal(first.answers[one.side.name], second.answers[one.side.name])


def test_tasks_without_one_are_fed_as_before(world):
    host, data, kept = world
    fed = kept.data(data, final=False)
    assert solve_closed_form([methods.build("linear", host, CLASSES)], fed.train) is fed.train
