"""Rare classes: weights in the loss, balanced sampling, and the warning where nobody asked for either."""

import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight

import restuning
from awake import tiny_vit
from restuning import FitSettings, Host, Tuned, fit, methods
from restuning._errors import FormatError, RestuningWarning, TrainingError
from restuning.problems import (
    IGNORED,
    UNLABELLED,
    MultiLabel,
    Regression,
    Segmentation,
    SingleLabel,
    Tokens,
)
from restuning.training.balance import finds_by_targets, takes_weights, warn_of_imbalance
from restuning.training.parallel_runs import train_in_parallel
from restuning.training.randomness import Order, Steps

SUMS = 1e-5
"""Sums in single precision, in another order."""
SMALL = {"epochs": 3, "batch_size": 8, "lr": 0.05, "checkpoint_every": 2}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uneven(count=40, classes=3, seed=0):
    chances = torch.tensor([0.8, 0.15, 0.05][:classes])
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(chances, count, replacement=True, generator=generator)
    labels[:classes] = torch.arange(classes)
    return labels


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_weights_are_those_of_scikit_learn_and_one_on_average(seed):
    labels = uneven(seed=seed)
    weights = SingleLabel().balance(labels, 3)
    wanted = compute_class_weight("balanced", classes=np.arange(3), y=labels.numpy())
    np.testing.assert_allclose(weights, wanted, rtol=SUMS)
    assert float(weights[labels].mean()) == pytest.approx(1, abs=SUMS)


def rare_pixels():
    """Three images: a class everywhere, one in two of them, one in a pixel, and one nowhere."""
    masks = torch.zeros(3, 6, 6, dtype=torch.uint8)
    masks[:2, :3], masks[2, 0, 0], masks[:, 5] = 1, 2, UNLABELLED
    return masks


def test_weights_of_masks_are_by_pixels_and_groups_and_counts_by_images():
    masks, problem = rare_pixels(), Segmentation()
    weights = problem.balance(masks, 4)
    known = masks[masks != UNLABELLED]
    wanted = compute_class_weight("balanced", classes=np.arange(3), y=known.numpy())
    np.testing.assert_allclose(weights, [*wanted, 1], rtol=SUMS)
    assert float(weights[known.long()].mean()) == pytest.approx(1, abs=SUMS)
    assert [group.tolist() for group in problem.groups(masks, 4)] == [[0, 1, 2], [0, 1], [2], []]
    assert problem.counts(masks, 4).tolist() == [3, 2, 1, 0]
    # One without any class is never drawn: it teaches nothing.
    nothing = torch.cat([masks, torch.full_like(masks[:1], UNLABELLED)])
    assert not any(3 in group.tolist() for group in problem.groups(nothing, 4))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_weights_of_masks_weigh_each_pixel_by_its_class(smoothing):
    masks, problem = rare_pixels(), Segmentation()
    logits, weights = draw(3, 6, 6, 4), torch.tensor([0.5, 2.0, 9.0, 1.0])
    each = torch.nn.functional.cross_entropy(
        logits.movedim(-1, 1),
        masks.long(),
        ignore_index=UNLABELLED,
        reduction="none",
        label_smoothing=smoothing,
    )
    known = masks != UNLABELLED
    each = each * weights[masks.long().where(known, 0)]
    means = each.sum((1, 2)) / known.sum((1, 2))
    found = problem.weighted_loss(logits, masks, weights, smoothing)
    torch.testing.assert_close(found, means.sum())
    ones = problem.weighted_loss(logits, masks, torch.ones(4), smoothing)
    torch.testing.assert_close(ones, problem.loss(logits, masks, smoothing))


def test_a_class_without_an_example_changes_no_weight():
    labels = uneven()
    assert torch.equal(SingleLabel().balance(labels, 5)[:3], SingleLabel().balance(labels, 3))


def test_weights_of_labels_are_pos_weight_with_a_mean_of_one():
    targets = (torch.rand(50, 4, generator=torch.Generator().manual_seed(0)) < 0.2).float()
    targets[:, 3] = 0
    absent, present = MultiLabel().balance(targets, 4)
    counts = targets.sum(0)
    torch.testing.assert_close((present / absent)[:3], ((50 - counts) / counts)[:3])
    means = torch.where(targets > 0, present, absent).mean(0)
    torch.testing.assert_close(means, torch.ones(4))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_weights_of_one_change_no_loss(smoothing):
    logits = draw(10, 3)
    words = torch.randint(3, (10, 4), generator=torch.Generator().manual_seed(1))
    words[:, 1] = IGNORED
    for problem, z, targets, ones in (
        (SingleLabel(), logits, uneven(10), torch.ones(3)),
        (Tokens(), draw(10, 4, 3), words, torch.ones(3)),
        (MultiLabel(), logits, (draw(10, 3, seed=2) > 0).float(), torch.ones(2, 3)),
    ):
        weighted = problem.weighted_loss(z, targets, ones, smoothing)
        torch.testing.assert_close(weighted, problem.loss(z, targets, smoothing))


def test_a_weight_counts_an_example_as_often():
    logits, labels, weights = draw(12, 3), uneven(12), torch.tensor([1.0, 2.0, 5.0])
    times = weights[labels].long()
    repeated = SingleLabel().loss(
        logits.repeat_interleave(times, 0), labels.repeat_interleave(times)
    )
    torch.testing.assert_close(SingleLabel().weighted_loss(logits, labels, weights), repeated)


@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_a_balanced_epoch_takes_as_many_of_each_class_and_repeats_none_before_all_were_taken(
    count, size, seed
):
    labels = uneven(max(count, 3), seed=seed)
    groups = SingleLabel().groups(labels, 4)
    order = Order(len(labels), size, 2, seed, groups)
    for epoch in range(2):
        steps = range(epoch * order.per_epoch, (epoch + 1) * order.per_epoch)
        taken = [n for step in steps for n in order.batch(step)]
        assert len(taken) == len(labels)
        of_class = Counter(labels[taken].tolist())
        assert max(of_class.values()) - min(of_class.values()) <= 1
        for group in groups[:3]:
            times = [taken.count(n) for n in group.tolist()]
            assert max(times) - min(times) <= 1
        turns = [turn for step in steps for turn in order.turns(step)]
        assert turns == [taken[:n].count(each) for n, each in enumerate(taken)]
    again = Order(len(labels), size, 2, seed, groups)
    # Asked out of turn, as a run that goes on does.
    assert again.batch(order.total - 1) == order.batch(order.total - 1)


def test_an_example_that_comes_again_in_an_epoch_is_augmented_anew():
    labels = torch.tensor([0] * 9 + [1])
    order = Order(10, 5, 2, 0, SingleLabel().groups(labels, 2))
    drawn = [at for batch in Steps(order, 0, 0, 1) for at in batch]
    assert len(set(drawn)) == len(drawn) == 20
    assert sum(index == 9 for _, index in drawn) == 10


def test_several_labels_are_drawn_by_each_label_and_by_none():
    targets = torch.zeros(40, 2)
    targets[:30, 0], targets[29:31, 1] = 1, 1
    order = Order(40, 8, 1, 0, MultiLabel().groups(targets, 2))
    taken = torch.tensor([n for step in range(order.total) for n in order.batch(step)])
    # 30 + 2 + 9 examples are in three groups, of each of which 13 or 14 are taken.
    assert int(targets[taken, 1].sum()) >= 13
    assert int((targets[taken].sum(1) == 0).sum()) >= 13


class Uneven(torch.utils.data.Dataset):
    """Of `points`, most are of one class."""

    def __init__(self, points):
        self.points = points
        self.x, self.y = points.x, points.y
        rare = torch.arange(len(self.y)) % 5 > 0
        self.y = torch.where(rare, 0, self.y)

    identity = "uneven points"

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        return self.points[index][0], int(self.y[index])


def train(tuned, data, out, **more):
    return fit(tuned, data, settings=FitSettings(**{**SMALL, **more}), out=out, progress=False)


ASKED = {"class_weights": "balanced", "balanced_sampling": True}


def test_a_run_with_both_that_was_stopped_goes_on_bit_equal(tmp_path, make_tuned, points):
    whole, plain = make_tuned(), make_tuned()
    train(whole, Uneven(points(40)), tmp_path / "whole", **ASKED)
    train(plain, Uneven(points(40)), tmp_path / "plain")
    state = whole.task.state_dict()
    assert not torch.equal(state["head.weight"], plain.task.state_dict()["head.weight"])

    def stop(seen):
        if seen == 110:
            raise RuntimeError("stopped here")

    data = Uneven(points(40))
    data.points.broken = stop
    with pytest.raises(RuntimeError, match="stopped here"):
        train(make_tuned(), data, tmp_path / "halves", **ASKED)
    halves = make_tuned(seed=9)
    train(halves, Uneven(points(40)), tmp_path / "halves", **ASKED)
    assert all(torch.equal(state[n], t) for n, t in halves.task.state_dict().items())
    for name, usual in (("class_weights", None), ("balanced_sampling", False)):
        with pytest.raises(TrainingError, match=name):
            train(make_tuned(), Uneven(points(40)), tmp_path / "halves", **{**ASKED, name: usual})


def test_a_run_from_before_these_settings_is_the_same_run():
    assert not ASKED.keys() & FitSettings().identity().keys()
    assert ASKED.items() <= FitSettings(**ASKED).identity().items()
    with pytest.raises(TrainingError, match="class_weights"):
        FitSettings(class_weights="equal")
    with pytest.raises(TrainingError, match="balanced_sampling"):
        FitSettings(balanced_sampling="yes")


@pytest.fixture(scope="module")
def host():
    return Host(tiny_vit(), torch.zeros(1, 3, 32, 32))


@pytest.fixture(scope="module")
def images():
    return [(draw(3, 32, 32, seed=n), int(k)) for n, k in enumerate(uneven(12))]


@pytest.mark.parametrize(
    ("method", "asked"),
    [
        ("ridge", {"balanced_sampling": True}),
        ("ensemble", {"balanced_sampling": True}),
        ("knn", {"class_weights": "balanced"}),
    ],
)
def test_what_is_solved_in_closed_form_refuses_what_it_cannot_do(
    tmp_path, host, images, method, asked
):
    task = methods.build(method, host, num_classes=3)
    with pytest.raises(TrainingError, match="closed form") as refused:
        train(Tuned(host, task), images, tmp_path, **asked)
    # What it names in its place is none that is refused as well.
    (name,) = asked
    assert f"leave out --{name.replace('_', '-')}, or choose a method" in str(refused.value)
    assert finds_by_targets(task)
    assert not finds_by_targets(methods.build("linear", host, num_classes=3))


@pytest.mark.parametrize("method", ["ridge", "ensemble"])
def test_what_is_solved_in_closed_form_is_weighed_as_the_steps_are(tmp_path, host, images, method):
    found = []
    for name, asked in (("plain", {}), ("weighed", {"class_weights": "balanced"})):
        torch.manual_seed(0)
        task = methods.build(method, host, num_classes=3)
        assert takes_weights(task)
        train(Tuned(host, task), images, tmp_path / name, **asked)
        closed = task.side if method == "ridge" else task.side.parts[0]
        found.append((closed.weight.clone(), closed.class_weights))
    assert not torch.equal(found[0][0], found[1][0])
    labels = torch.tensor([label for _, label in images])
    assert found[0][1] is None
    assert torch.equal(found[1][1], SingleLabel().balance(labels, 3))


def test_a_weighed_solution_keeps_no_sums_and_an_update_says_why(tmp_path):
    told = []
    run = restuning.train(
        "digits",
        method="ridge",
        class_weights="balanced",
        out=tmp_path / "run",
        store=tmp_path / "stores",
        report=False,
        log=told.append,
    )
    assert any("not kept for `restuning update`: classes are weighed" in line for line in told)
    assert run.metrics["settings"]["class_weights"] == "balanced"
    with pytest.raises(FormatError, match="--class-weights"):
        restuning.update(run.folder, "digits")


@pytest.mark.parametrize(("name", "value"), ASKED.items())
def test_a_choice_refuses_them_before_anything_is_read_also_in_settings(tmp_path, name, value):
    for given_by in ({name: value}, {"settings": FitSettings(**{name: value})}):
        with pytest.raises(TrainingError, match="classes as they are"):
            restuning.train("digits", method="auto", out=tmp_path / "no", **given_by)
    assert not (tmp_path / "no").exists()


def test_numbers_and_parallel_runs_refuse_them_in_words(tmp_path, host, images):
    task = methods.build("linear", host, num_classes=1)
    targets = draw(12, 1)
    task.problem = Regression.of(targets)
    numbers = [(x, y) for (x, _), y in zip(images, targets, strict=True)]
    for name, value in ASKED.items():
        with pytest.raises(TrainingError, match="regression"):
            train(Tuned(host, task), numbers, tmp_path, **{name: value})
        with pytest.raises(TrainingError, match="in parallel"):
            train_in_parallel(host, [task], [FitSettings(**{name: value})], None, None)


def test_strong_imbalance_is_warned_of_once_and_not_where_something_is_done():
    labels = torch.tensor([0] * 30 + [1] * 2 + [2] * 8)
    train = torch.utils.data.TensorDataset(torch.zeros(40, 1), labels)
    with pytest.warns(RestuningWarning, match="lynx: 2, cat: 30") as told:
        warn_of_imbalance(SingleLabel(), train, ["cat", "lynx", "dog"], FitSettings())
    assert len(told) == 1
    assert "--class-weights balanced" in str(told[0].message)
    with pytest.warns(RestuningWarning, match="of a method that is trained by steps"):
        warn_of_imbalance(
            *(SingleLabel(), train, ["cat", "lynx", "dog"], FitSettings()),
            by_steps=False,
            weighs=False,
        )
    with pytest.warns(RestuningWarning, match="with --class-weights balanced rare ones"):
        warn_of_imbalance(
            SingleLabel(), train, ["cat", "lynx", "dog"], FitSettings(), by_steps=False
        )
    words = [("a", label) for label in labels[:, None].tolist()]
    with pytest.warns(RestuningWarning, match="much rarer") as told:
        warn_of_imbalance(Tokens(), words, ["O", "B", "I"], FitSettings())
    # Of tokens it would be refused.
    assert "--balanced-sampling" not in str(told[0].message)
    assert "--class-weights balanced" in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, value in ASKED.items():
            warn_of_imbalance(SingleLabel(), train, ["a", "b", "c"], FitSettings(**{name: value}))
        even = torch.utils.data.TensorDataset(torch.zeros(40, 1), labels.clamp(max=0))
        warn_of_imbalance(SingleLabel(), even, ["a", "b", "c"], FitSettings())
        numbers = torch.utils.data.TensorDataset(torch.zeros(40, 1), draw(40, 1))
        warn_of_imbalance(Regression.of(draw(40, 1)), numbers, ["a"], FitSettings())
