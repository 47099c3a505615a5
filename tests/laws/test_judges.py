"""What judges tell of answers: scikit-learn's figures, and laws over every kind of answer."""

import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from test_problems import NAMES, PROBLEMS, make_logits, make_targets

from restuning.problems import (
    IGNORED,
    UNLABELLED,
    Depth,
    MultiLabel,
    Regression,
    Segmentation,
    SingleLabel,
)
from restuning.problems.judge import SHOWN, Judge, thin_map
from restuning.problems.judged import Confusion, Reliability, Scatter
from restuning.problems.palette import NO_NUMBER, make_shades
from restuning.problems.reliability import calibration_error, find_reliability

SINGLE = 1e-5
"""torchmetrics sums in single precision."""
ROWS = 60
OF_VECTORS = ["a", "b", "c", "d"]
"""Classes of the sample of embeddings, whose outputs are none."""


def given(name):
    logits, targets = make_logits(name, ROWS), make_targets(name, ROWS)
    if name == "tokens":
        # As evaluation hands them on.
        counted = targets != IGNORED
        logits, targets = logits[counted], targets[counted]
    return logits, targets


def judge(name, temperature=1.0, pieces=7):
    logits, targets = given(name)
    made = PROBLEMS[name].judge(OF_VECTORS if name == "embedding" else NAMES, temperature)
    for some, own in zip(logits.split(pieces), targets.split(pieces), strict=True):
        made.update(some, own)
    return made.conclude()


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_judge_tells_the_metrics_of_its_problem_and_a_row_of_every_answer(name):
    logits, targets = given(name)
    judged, problem = judge(name), PROBLEMS[name]
    meters = problem.metrics(len(NAMES))
    meters.update(logits, targets)
    for key, value in meters.compute().items():
        assert judged.figures[key] == pytest.approx(float(value), abs=SINGLE)
    assert problem.metric in judged.figures
    assert judged.count == len(judged.rows) == len(logits)
    assert set(judged.shares) >= ({problem.metric} if problem.percent else set())
    losses = [mistake.loss for mistake in judged.worst]
    assert losses == sorted(losses, reverse=True)
    assert judged.rows[judged.worst[0].row]["loss"] == pytest.approx(losses[0], rel=SINGLE)


@pytest.mark.parametrize("name", PROBLEMS)
def test_batches_do_not_matter(name):
    one, other = judge(name, pieces=7), judge(name, pieces=1000)
    for key, value in one.figures.items():
        assert value == pytest.approx(other.figures[key], abs=SINGLE)
    assert [m.row for m in one.worst] == [m.row for m in other.worst]


# Of texts a batch may have no labelled token.
@pytest.mark.parametrize(("name", "batches"), [*((name, 0) for name in PROBLEMS), ("tokens", 1)])
def test_of_no_answers_nothing_is_told(name, batches):
    logits, targets = given(name)
    made = PROBLEMS[name].judge(OF_VECTORS if name == "embedding" else NAMES)
    for _ in range(batches):
        made.update(logits[:0], targets[:0])
    judged = made.conclude()
    assert judged.count == 0 and not any(judged.figures.values())
    assert not judged.rows and not judged.worst


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_kind_that_knows_no_judge_is_judged_by_its_metrics(name):
    logits, targets = given(name)
    plain = Judge(PROBLEMS[name], NAMES)
    plain.update(logits, targets)
    told = plain.conclude()
    assert told.count == len(logits)
    for key, value in told.figures.items():
        assert value == pytest.approx(judge(name).figures[key], abs=SINGLE)
    assert told.breakdown is None and not told.pictures and told.worst


def test_outputs_without_names_are_counted_on_the_last_axis_of_logits():
    logits, (_, targets) = make_logits("segmentation", ROWS, side=2), given("segmentation")
    named, nameless = Judge(PROBLEMS["segmentation"], NAMES), Judge(PROBLEMS["segmentation"], [])
    for each in (named, nameless):
        each.update(logits, targets)
    assert nameless.conclude().figures == named.conclude().figures


def test_figures_of_classes_are_those_of_scikit_learn():
    logits, labels = given("single-label")
    labels = labels.clone()
    # A class that is answered and never true.
    labels[labels == 2] = 0
    problem, temperature = SingleLabel(), 1.7
    made = problem.judge(NAMES, temperature)
    made.update(logits, labels)
    judged = made.conclude()
    chances = problem.values(logits, temperature).numpy()
    told, truth = logits.argmax(1).numpy(), labels.numpy()
    areas = [sk.roc_auc_score(truth == k, chances[:, k]) for k in (0, 1)]
    wanted = {
        "accuracy": sk.accuracy_score(truth, told),
        "balanced_accuracy": np.mean([np.mean(told[truth == k] == k) for k in (0, 1)]),
        "f1_macro": sk.f1_score(truth, told, average="macro"),
        "auroc": np.mean(areas),
        "nll": -np.log(chances[np.arange(len(truth)), truth]).mean(),
    }
    for key, value in wanted.items():
        assert judged.figures[key] == pytest.approx(value, abs=SINGLE), key
    assert judged.wrong == (told != truth).sum()
    breakdown = judged.breakdown
    assert breakdown.names == NAMES
    assert breakdown.columns["examples"] == np.bincount(truth, minlength=3).tolist()
    assert breakdown.columns["recall"][2] is None
    assert breakdown.columns["precision"][0] == pytest.approx(
        sk.precision_score(truth, told, average=None)[0], abs=SINGLE
    )
    confusion, reliability = judged.pictures
    assert isinstance(confusion, Confusion) and isinstance(reliability, Reliability)
    assert confusion.counts.tolist() == sk.confusion_matrix(truth, told, labels=[0, 1, 2]).tolist()
    truest, as_what, times, of = confusion.pairs()[0]
    assert times == confusion.counts[NAMES.index(truest), NAMES.index(as_what)]
    assert of == confusion.counts[NAMES.index(truest)].sum()
    assert sum(reliability.counts) == len(labels)


def test_figures_of_labels_are_those_of_scikit_learn():
    logits, targets = given("multi-label")
    judged = judge("multi-label", 0.6)
    told, truth = (logits >= 0).numpy(), targets.numpy()
    assert judged.figures["auroc"] == pytest.approx(sk.roc_auc_score(truth, logits), abs=SINGLE)
    for title, score in (
        ("precision", sk.precision_score),
        ("recall", sk.recall_score),
        ("F1", sk.f1_score),
    ):
        wanted = score(truth, told, average=None, zero_division=math.nan)
        np.testing.assert_allclose(judged.breakdown.columns[title], wanted, atol=SINGLE)
    wanted = sk.average_precision_score(truth, logits, average=None)
    np.testing.assert_allclose(judged.breakdown.columns["average precision"], wanted, atol=SINGLE)
    assert judged.wrong == (told != truth).any(1).sum()
    row = judged.rows[0]
    assert row["true"] == "|".join(n for n, there in zip(NAMES, truth[0], strict=True) if there)


def test_figures_of_numbers_and_their_scatter_are_in_units():
    logits, targets = given("regression")
    judged, problem = judge("regression"), PROBLEMS["regression"]
    values = problem.values(logits)
    wanted = sk.r2_score(targets.double(), values.double(), multioutput="raw_values")
    np.testing.assert_allclose(judged.breakdown.columns["R2"], wanted, rtol=1e-4)
    assert [p.name for p in judged.pictures] == NAMES
    assert all(isinstance(p, Scatter) for p in judged.pictures)
    assert judged.pictures[0].error == problem.error[0]
    assert judged.pictures[0].truth == pytest.approx(targets[:, 0].tolist())
    assert judged.wrong is None
    assert judged.rows[0]["answer a"] == pytest.approx(float(values[0, 0]))


def test_of_vectors_the_class_of_the_nearest_decides():
    logits, labels = given("embedding")
    judged, unit = judge("embedding"), torch.nn.functional.normalize(logits)
    cosines = unit @ unit.T
    cosines.fill_diagonal_(-2)
    hits = labels[cosines.argmax(1)] == labels
    assert judged.wrong == int((~hits).sum())
    assert judged.figures["recall_at_1"] == pytest.approx(float(hits.float().mean()))
    recall = [float(hits[labels == k].float().mean()) for k in range(4)]
    assert judged.breakdown.columns["recall at 1"] == pytest.approx(recall)
    worst = judged.worst[0]
    nearest = labels[cosines[worst.row].argmax()]
    assert (worst.told, worst.truth) == (
        f"near {OF_VECTORS[nearest]}",
        OF_VECTORS[labels[worst.row]],
    )


def test_figures_of_masks_are_those_of_scikit_learn_over_the_pixels_that_have_a_class():
    problem, names = Segmentation(), ["ground", "road", "tree", "sea"]
    generator = torch.Generator().manual_seed(3)
    masks = torch.randint(3, (5, 6, 8), generator=generator).to(torch.uint8)
    masks[:, 0] = UNLABELLED
    masks[4] = UNLABELLED
    logits = torch.randn(5, 3, 4, 4, generator=generator)
    # One class is answered and never there, and one is there and never answered.
    logits[..., 1] = -9
    made = problem.judge(names)
    for at in ([0, 1], [2, 3, 4]):
        made.update(logits[at], masks[at])
    judged = made.conclude()
    known = masks != UNLABELLED
    truth, told = masks[known].numpy(), problem.draw(logits, masks)[known].numpy()
    wanted = {
        "mean_iou": sk.jaccard_score(truth, told, average="macro"),
        "pixel_accuracy": sk.accuracy_score(truth, told),
        "mean_accuracy": np.mean([np.mean(told[truth == k] == k) for k in range(3)]),
    }
    assert judged.figures == pytest.approx(wanted)
    each = judged.breakdown.columns
    ious = sk.jaccard_score(truth, told, average=None, labels=range(4))
    np.testing.assert_allclose(each["IoU"], ious)
    assert each["pixels"] == np.bincount(truth, minlength=4).tolist()
    assert each["pixel accuracy"][3] is None
    (confusion,) = judged.pictures
    assert confusion.counts.tolist() == sk.confusion_matrix(truth, told, labels=range(4)).tolist()
    assert confusion.unit == "pixels"
    # The largest class everywhere.
    largest = np.bincount(truth).argmax()
    constant = np.full_like(truth, largest)
    assert judged.constant["mean_iou"] == pytest.approx(
        sk.jaccard_score(truth, constant, average="macro", zero_division=0)
    )
    assert judged.constant["mean_accuracy"] == pytest.approx(1 / 3)
    # Of an image without any class nothing is told, and nothing is counted.
    assert judged.rows[4]["mean IoU"] is None and judged.rows[4]["loss"] == 0
    assert judged.rows[0]["pixel accuracy"] == pytest.approx(
        np.mean(
            problem.draw(logits[:1], masks[:1])[known[:1]].numpy() == masks[0][known[0]].numpy()
        )
    )
    assert judged.breakdown.rows()[3]["name"] == "sea"
    assert judged.breakdown.colours[:2] == ["#000000", "#800000"]


def test_of_the_worst_masks_truth_and_answer_are_shown_in_the_colours_of_their_classes():
    problem = Segmentation()
    masks = torch.zeros(3, 4, 4, dtype=torch.uint8)
    masks[1, :2], masks[1, 3] = 1, UNLABELLED
    logits = torch.zeros(3, 4, 4, 2)
    logits[..., 0] = 5
    made = problem.judge(["ground", "road"])
    made.update(logits, masks)
    worst = made.conclude().worst
    assert [each.row for each in worst] == [1, 0, 2]
    truth, told = worst[0].maps
    assert (truth.title, told.title) == ("true", "answered")
    assert truth.pixels[0, 0].tolist() == [128, 0, 0] and truth.pixels[2, 0].tolist() == [0, 0, 0]
    # No class has the last colour of the palette.
    assert truth.pixels[3, 0].tolist() == [224, 224, 192]
    assert not told.pixels.any()
    assert worst[0].truth == "road 66.7%, ground 33.3%"
    assert worst[0].told == "ground 100.0%; mean IoU 16.7%"


def test_a_constant_answer_has_what_it_must():
    classes = judge("single-label", 2.0).constant
    labels = given("single-label")[1]
    shares = torch.bincount(labels).double() / len(labels)
    assert classes["accuracy"] == pytest.approx(float(shares.max()))
    assert classes["balanced_accuracy"] == pytest.approx(1 / 3, abs=SINGLE)
    assert classes["auroc"] == pytest.approx(0.5, abs=SINGLE)
    assert classes["nll"] == pytest.approx(float(-(shares * shares.log()).sum()), abs=SINGLE)
    assert judge("multi-label").constant["auroc"] == 0.5
    assert judge("regression").constant["r2"] == pytest.approx(0, abs=SINGLE)


def test_answers_that_are_all_but_certain_still_have_an_order():
    """Their probabilities are all 1 in single precision, and in double from 37 on."""
    sure = torch.linspace(40, 60, 20)
    truth = torch.tensor([0] * 10 + [1] * 10)
    classes = SingleLabel().judge(["no", "yes", "never"])
    classes.update(torch.stack([torch.zeros(20), sure, torch.full((20,), -9.0)], 1), truth)
    assert classes.conclude().figures["auroc"] == 1
    labels = MultiLabel().judge(["all", "none"])
    labels.update(torch.stack([sure, -sure], 1), torch.stack([truth, 1 - truth], 1).float())
    judged = labels.conclude()
    assert judged.figures["auroc"] == judged.figures["mean_average_precision"] == 1
    assert judged.breakdown.columns["average precision"] == [1, 1]


def test_figures_that_are_not_defined_are_none():
    made = SingleLabel().judge(["a", "b"])
    made.update(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    told = made.conclude()
    assert told.figures["auroc"] is None
    assert told.figures["accuracy"] == 1 and told.wrong == 0 and not told.worst
    numbers = Regression([0.0], [1.0]).judge(["x"])
    numbers.update(torch.zeros(1, 1), torch.zeros(1, 1))
    assert numbers.conclude().figures["r2"] is None
    labels = MultiLabel().judge(["a", "b"])
    labels.update(torch.zeros(3, 2), torch.zeros(3, 2))
    assert labels.conclude().figures["mean_average_precision"] is None


def test_the_calibration_error_is_what_the_reliability_shows():
    confidence = torch.rand(400, generator=torch.Generator().manual_seed(0))
    right = torch.rand(400, generator=torch.Generator().manual_seed(1)) < confidence
    found = find_reliability(confidence, right)
    off = sum(
        n * abs(p - q) for n, p, q in zip(found.counts, found.confidence, found.right, strict=True)
    )
    assert off / 400 == pytest.approx(calibration_error(confidence, right))


def test_figures_of_depths_are_over_known_pixels_and_beside_them_stands_the_mean_of_training():
    problem = Depth(3.0, 2.0)
    generator = torch.Generator().manual_seed(0)
    depths = 1 + 8 * torch.rand(5, 6, 8, generator=generator)
    depths[0, :3], depths[1, 0, 0], depths[4] = 0, torch.nan, 0
    logits = torch.randn(5, 6, 8, 1, generator=generator)
    made = problem.judge([])
    for at in (slice(0, 2), slice(2, 5)):
        made.update(logits[at], depths[at])
    judged, known = made.conclude(), depths > 0
    told, truth = (2 * logits[..., 0] + 3)[known].numpy(), depths[known].numpy()
    assert judged.figures["rmse"] == pytest.approx(
        sk.mean_squared_error(truth, told) ** 0.5, rel=SINGLE
    )
    assert judged.figures["r2"] == pytest.approx(sk.r2_score(truth, told), rel=10 * SINGLE)
    same = np.full_like(truth, 3.0)
    assert judged.constant["mae"] == pytest.approx(sk.mean_absolute_error(truth, same), rel=SINGLE)
    assert judged.constant["r2"] == pytest.approx(sk.r2_score(truth, same), rel=10 * SINGLE)
    assert [row["known pixels"] for row in judged.rows] == known.sum((1, 2)).tolist()
    assert judged.rows[4]["RMSE"] is None
    off = judged.rows[2]["RMSE"]
    own = np.sqrt(np.mean((2 * logits[2, ..., 0] + 3 - depths[2]).numpy() ** 2))
    assert off == pytest.approx(own, rel=SINGLE)


@pytest.mark.parametrize("rows", [1, 4, 5, 9])
@pytest.mark.parametrize("problem", [Segmentation(), Depth(3.0, 2.0)], ids=["masks", "depths"])
def test_an_image_that_comes_some_rows_at_a_time_is_judged_as_a_whole_one(problem, rows):
    generator = torch.Generator().manual_seed(0)
    of_masks = isinstance(problem, Segmentation)
    labels = NAMES if of_masks else []
    logits = torch.randn(5, 9, 8, len(NAMES) if of_masks else 1, generator=generator)
    if of_masks:
        targets = torch.randint(len(NAMES), (5, 9, 8), generator=generator)
        # Of some parts nothing is known, of one image nothing at all.
        targets[0, :5] = targets[4] = problem.ignore
    else:
        targets = 1 + 8 * torch.rand(5, 9, 8, generator=generator)
        targets[0, :5] = targets[4] = 0
    whole, in_rows = problem.judge(labels), problem.judge(labels)
    whole.update(logits, targets)
    for own, wanted in zip(logits, targets, strict=True):
        in_rows.update_in_rows(zip(own.split(rows), wanted.split(rows), strict=True))
    one, other = whole.conclude(), in_rows.conclude()
    assert other.figures == pytest.approx(one.figures, rel=10 * SINGLE)
    assert other.constant == pytest.approx(one.constant, rel=10 * SINGLE)
    for same, row in zip(one.rows, other.rows, strict=True):
        assert row.keys() == same.keys()
        for name, value in same.items():
            near = None if value is None else pytest.approx(value, rel=10 * SINGLE, abs=SINGLE)
            assert row[name] == near
    for same, mistake in zip(one.worst, other.worst, strict=True):
        assert (mistake.row, mistake.told, mistake.truth) == (same.row, same.told, same.truth)
        assert len(mistake.maps) == len(same.maps)
        for a, b in zip(mistake.maps, same.maps, strict=True):
            assert torch.equal(a.pixels, b.pixels)


def test_a_large_map_is_kept_no_larger_than_it_is_shown():
    for shape in ((3, 4), (SHOWN, 7), (SHOWN + 1, 7), (9, 5 * SHOWN)):
        kept = thin_map(torch.arange(shape[0] * shape[1]).view(shape))
        assert max(kept.shape) <= SHOWN and min(kept.shape) >= 1
        assert (kept.shape == shape) == (max(shape) <= SHOWN)
        # A view would hold the whole.
        assert kept.untyped_storage().nbytes() == 8 * kept.numel()


def test_of_the_worst_depths_truth_and_answer_are_shown_on_one_scale_and_what_is_unknown_is_grey():
    problem = Depth(0.0, 1.0)
    depths = torch.tensor([[[1.0, 2.0], [0.0, 4.0]], [[1.0, 1.0], [1.0, 1.0]]])
    logits = torch.tensor([[[1.0, 2.0], [3.0, 2.0]], [[1.0, 1.0], [1.0, 1.0]]])[..., None]
    made = problem.judge([])
    made.update(logits, depths)
    worst = made.conclude().worst
    assert [each.row for each in worst] == [0, 1]
    truth, told = (each.pixels for each in worst[0].maps)
    shades = torch.tensor(make_shades(), dtype=torch.uint8).view(-1, 3)
    assert torch.equal(truth[1, 1], shades[-2]) and torch.equal(truth[0, 0], shades[0])
    # The same number has the same colour in both.
    assert torch.equal(truth[0], told[0]) and not torch.equal(truth[1, 1], told[1, 1])
    assert truth[1, 0].tolist() == told[1, 0].tolist() == list(NO_NUMBER)
