"""Laws over the table of problems: a new one gets them by existing."""

import copy
import json
import re
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import default_collate

from awake import tiny_vit, wake
from restuning import (
    Bank,
    FitSettings,
    Host,
    Tuned,
    evaluate,
    fit,
    load,
    load_backbone,
    methods,
    save,
)
from restuning._errors import (
    FormatError,
    TrainingError,
    TunerShapeError,
    UnknownNameError,
    WrongTaskError,
)
from restuning.bypass import Ridge
from restuning.bypass.solution import INTERCEPT, PENALTIES, find_gradient, solve
from restuning.bypass.stacking import find_weights
from restuning.bypass.sums import Sums, keys_of_numbers
from restuning.problems import (
    IGNORED,
    UNLABELLED,
    Depth,
    DepthAnswer,
    Embedding,
    MultiLabel,
    Problem,
    Regression,
    Segmentation,
    SingleLabel,
    Tokens,
)
from restuning.problems import from_spec as problem_from_spec
from restuning.problems.problem import _REGISTRY, kinds, problem, read_meters
from restuning.task import Task
from serving import save_task

OUTPUTS, ROWS = 3, 12
CLOSED = ("ridge", "ensemble", "knn")
NAMES = ["a", "b", "c"]
MASK = 8
"""Side of masks; logits stand on the four by four patches of the images."""
SAME_TOLERANCE = 1e-5
"""Products of other batch sizes round elsewhere."""
CLOSED_TOLERANCE = 1e-4
"""Solved in double, kept in single precision, and logits are tens."""
METRIC_TOLERANCE = 1e-5
"""torchmetrics sums in single precision."""

PROBLEMS = {
    "single-label": SingleLabel(),
    "tokens": Tokens(),
    "multi-label": MultiLabel(),
    "embedding": Embedding(4, OUTPUTS),
    "regression": Regression([100.0, 0.0, -3.0], [5.0, 1.0, 0.01], [2.0, 0.1, 0.02]),
    "segmentation": Segmentation(window=(40, 60)),
    "depth": Depth(20.0, 4.0, 0.5),
}
OF_IMAGES = [name for name in PROBLEMS if name != "tokens"]
OF_PIXELS = ("segmentation", "depth")
OF_NUMBERS = ("regression", "depth")


def outputs_of(name):
    """A pixel has one number; of all others there are as many as names."""
    return 1 if name == "depth" else OUTPUTS


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def make_targets(name, rows=ROWS):
    if name == "single-label":
        return torch.randint(OUTPUTS, (rows,), generator=draw())
    if name == "embedding":
        # Of more classes than numbers are answered.
        return torch.randint(4, (rows,), generator=draw())
    if name == "tokens":
        words = torch.randint(OUTPUTS, (rows, 4), generator=draw())
        words[:, 2] = IGNORED
        return words
    if name == "multi-label":
        return (torch.rand(rows, OUTPUTS, generator=draw()) < 0.4).float()
    if name == "segmentation":
        masks = torch.randint(OUTPUTS, (rows, MASK, MASK), generator=draw())
        masks[:, 2] = UNLABELLED
        return masks.to(torch.uint8)
    if name == "depth":
        depths = 20 + 4 * torch.randn(rows, MASK, MASK, generator=draw()).clamp(-3, 3)
        depths[:, 2], depths[:, 3, 1] = 0, torch.nan
        return depths
    noise = torch.randn(rows, OUTPUTS, generator=draw())
    own = PROBLEMS["regression"]
    return noise * torch.tensor(own.deviation) + torch.tensor(own.mean)


def make_logits(name, rows=ROWS, grad=False, side=4):
    axes = {"tokens": (4,), **dict.fromkeys(OF_PIXELS, (side, side))}.get(name, ())
    return torch.randn(rows, *axes, outputs_of(name), generator=draw(1)).requires_grad_(grad)


@pytest.fixture(scope="module")
def host():
    return Host(tiny_vit(), torch.zeros(1, 3, 32, 32))


@pytest.fixture(scope="module")
def images():
    return torch.randn(ROWS, 3, 32, 32, generator=draw(2))


def build(name, host, method="res-tuning-bypass", seed=0):
    torch.manual_seed(seed)
    task = methods.build(method, host, num_classes=outputs_of(name), pool=PROBLEMS[name].pool)
    task.labels, task.problem = NAMES[: outputs_of(name)], PROBLEMS[name]
    return task


def test_every_problem_has_a_sample():
    assert kinds().keys() == PROBLEMS.keys()


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_is_built_again_from_its_spec_through_json(name):
    made = PROBLEMS[name]
    again = problem_from_spec(json.loads(json.dumps(made.spec())))
    assert again == made
    assert hash(again) == hash(made)
    assert type(again) is type(made)
    assert copy.deepcopy(made) == made
    assert "kind" not in repr(made)


@pytest.mark.parametrize("name", PROBLEMS)
def test_its_loss_is_a_sum_over_examples_with_a_gradient(name):
    logits, targets = make_logits(name, grad=True), make_targets(name)
    made = PROBLEMS[name]
    whole = made.loss(logits, targets)
    parts = [made.loss(logits[n : n + 1], targets[n : n + 1]) for n in range(ROWS)]
    torch.testing.assert_close(whole, sum(parts))
    assert torch.equal(made.score(logits, targets)[0], whole)
    whole.backward()
    assert logits.grad.isfinite().all()
    assert logits.grad.any()
    assert made.loss(logits[:0], targets[:0]) == 0
    assert made.loss(logits, made.stand_in(logits)).isfinite()


@pytest.mark.parametrize("name", OF_IMAGES)
def test_losses_of_several_runs_are_those_of_each(name):
    made, targets = PROBLEMS[name], make_targets(name)
    logits = torch.randn(2, *make_logits(name).shape, generator=draw(3))
    smoothing = [0.0, 0.0] if name in OF_NUMBERS else [0.0, 0.2]
    several = made.losses_of_several(logits, targets, torch.tensor(smoothing)[:, None])
    for loss, own, smooth in zip(several, logits, smoothing, strict=True):
        torch.testing.assert_close(loss, made.loss(own, targets, smooth) / ROWS)


@pytest.mark.parametrize("name", OF_IMAGES)
def test_the_gradient_of_the_closed_form_is_that_of_the_loss(name):
    made, targets = PROBLEMS[name], make_targets(name)
    logits = make_logits(name, grad=True, side=MASK)
    made.loss(logits, targets).backward()
    found = made.gradient(logits.detach(), made.columns(targets, outputs_of(name)))
    torch.testing.assert_close(found.float(), logits.grad)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_metric_that_is_shown_is_one_of_its_metrics(name):
    made, logits, targets = PROBLEMS[name], make_logits(name), make_targets(name)
    if name == "tokens":
        counted = targets != IGNORED
        logits, targets = logits[counted], targets[counted]
    meters = made.metrics(outputs_of(name))
    for part in range(0, len(logits), 5):
        meters.update(logits[part : part + 5], targets[part : part + 5])
    figures = read_meters(meters)
    measured = made.measure(logits, targets)
    assert figures[made.metric] == pytest.approx(measured, abs=METRIC_TOLERANCE)
    assert all(value is None or isinstance(value, float) for value in figures.values())
    assert made.metric.replace("_", " ") in made.tell(measured)
    assert made.show(None) == "-"


def test_better_answers_have_a_higher_metric():
    """Whatever the problem: choosing takes the highest."""
    for name in OF_IMAGES:
        made, targets = PROBLEMS[name], make_targets(name, 40)
        right = made.columns(targets, outputs_of(name)).float() * 8
        right = right / 8 if name in OF_NUMBERS else right - 4
        noise = torch.randn(right.shape, generator=draw(5))
        scores = [made.measure(right + scale * noise, targets) for scale in (0.0, 1.0, 20.0)]
        assert scores == sorted(scores, reverse=True)
        assert scores[0] == pytest.approx(1.0, abs=METRIC_TOLERANCE)


def test_unknown_pixels_count_in_nothing_whatever_they_are_called():
    made, logits, targets = PROBLEMS["depth"], make_logits("depth"), make_targets("depth")
    other = targets.clone()
    other[:, 2], other[:, 3, 1] = torch.nan, 0
    assert torch.equal(made.loss(logits, other), made.loss(logits, targets))
    meters = made.metrics(1), made.metrics(1)
    for each, wanted in zip(meters, (targets, other), strict=True):
        each.update(logits, wanted)
    assert read_meters(meters[0]) == read_meters(meters[1])
    nothing = torch.zeros_like(targets)
    assert made.loss(logits, nothing) == 0
    assert made.measure(logits, nothing) is None


def test_figures_of_depths_are_those_of_the_field():
    """By hand, of a row of pixels: two within a factor of 1.25, one not, one unknown."""
    made = Depth(0.0, 1.0)
    truth = torch.tensor([[[2.0, 4.0, 10.0, 0.0]]])
    told = torch.tensor([[2.2, 3.0, 9.0, 77.0]])[None, ..., None]
    meters = made.metrics(1)
    meters.update(told, truth)
    found = read_meters(meters)
    off = torch.tensor([0.2, 1.0, 1.0])
    known = truth[0, 0, :3]
    wanted = {
        "rmse": off.square().mean().sqrt(),
        "mae": off.mean(),
        "abs_rel": (off / known).mean(),
        "delta_1": torch.tensor(2 / 3),
        "r2": 1 - off.square().sum() / (known - known.mean()).square().sum(),
    }
    assert found == {name: pytest.approx(float(v), rel=1e-5) for name, v in wanted.items()}
    assert made.with_errors(told, truth).error == pytest.approx(found["rmse"])


@pytest.mark.parametrize("wrong", [-1.0, float("inf")])
def test_depths_below_zero_and_beyond_all_are_refused_by_name(wrong):
    depths = make_targets("depth")
    depths[4, 1, 5] = wrong
    with pytest.raises(TrainingError, match="infinite: depth/4.npy"):
        PROBLEMS["depth"].check_targets(depths, 1, lambda row: f"depth/{row}.npy")
    with pytest.raises(TrainingError, match="row 4 of the batch"):
        PROBLEMS["depth"].check_targets(depths)
    with pytest.raises(TrainingError, match="floating point"):
        PROBLEMS["depth"].check_targets(make_targets("segmentation"))
    with pytest.raises(FormatError, match="a head of 3 outputs"):
        PROBLEMS["depth"].check_outputs(3)


def test_a_depth_lies_on_what_was_seen_of_its_image_in_its_units():
    made, logits = PROBLEMS["depth"], make_logits("depth")[0]
    said = made.answer(made.values(logits), logits, ["depth"])
    inner = made.on_image(said, (50, 70), (10, -5, 60, 55))
    assert inner.depth.shape == (50, 70)
    assert inner.depth[:, :10].isnan().all()
    assert inner.depth[:, 10:60].isfinite().all()
    large = torch.nn.functional.interpolate(
        made.values(logits).movedim(-1, 0)[None], (60, 50), mode="bilinear", align_corners=False
    )
    torch.testing.assert_close(inner.depth[:, 10:60], large[0, 0, 5:55])
    assert inner.label.endswith("± 0.5")
    nothing = DepthAnswer(drawn=torch.full((2, 2), torch.nan))
    assert nothing.label == "-"


def test_a_metric_that_is_not_defined_is_none():
    numbers, labels = PROBLEMS["regression"], MultiLabel()
    assert numbers.measure(torch.zeros(1, 3), make_targets("regression", 1)) is None
    nothing = torch.zeros(4, OUTPUTS)
    logits = torch.randn(4, OUTPUTS, generator=draw())
    assert labels.measure(logits, nothing) is None
    nothing[:2, 0] = 1
    # Of the labels that are there.
    alone = labels.measure(logits[:, :1], nothing[:, :1])
    assert labels.measure(logits, nothing) == pytest.approx(alone)


@pytest.mark.parametrize("name", PROBLEMS)
def test_targets_of_another_kind_are_refused(name):
    made = PROBLEMS[name]
    made.check_targets(make_targets(name))
    made.check_targets(make_targets(name), outputs_of(name))
    for wrong in ("a word", [1, 2], torch.zeros(2, 2, 2, 2)):
        with pytest.raises(TrainingError):
            made.check_targets(wrong)


@pytest.mark.parametrize("name", ["multi-label", "regression"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_targets_that_are_no_numbers_are_refused_by_name(name, number):
    targets = make_targets(name)
    targets[4, 1] = number
    with pytest.raises(TrainingError, match="no number: table.csv, line 6"):
        PROBLEMS[name].check_targets(targets, OUTPUTS, lambda row: f"table.csv, line {row + 2}")
    with pytest.raises(TrainingError, match="row 4 of the batch"):
        PROBLEMS[name].check_targets(targets, OUTPUTS)


@pytest.mark.parametrize("name", ["multi-label", "regression"])
def test_targets_of_another_width_are_refused(name):
    with pytest.raises(TrainingError, match="in floating point"):
        PROBLEMS[name].check_targets(torch.zeros(4, OUTPUTS + 1), OUTPUTS)
    with pytest.raises(TrainingError, match="in floating point"):
        PROBLEMS[name].check_targets(torch.zeros(4, OUTPUTS, dtype=torch.long), OUTPUTS)


@pytest.mark.parametrize("wrong", [-1, 3])
def test_classes_beyond_the_outputs_are_refused(wrong):
    with pytest.raises(TrainingError, match="outside the task's classes: row of 1"):
        SingleLabel().check_targets(torch.tensor([0, wrong]), 3, lambda row: f"row of {row}")
    with pytest.raises(TrainingError, match="0 or 1"):
        MultiLabel().check_targets(torch.tensor([[0.0, 0.5, 1.0]]), 3)


@pytest.mark.parametrize("wrong", [-1, 3])
def test_pixels_beyond_the_outputs_are_refused_by_name(wrong):
    masks = make_targets("segmentation").long()
    PROBLEMS["segmentation"].check_targets(masks, OUTPUTS)
    masks[4, 1, 5] = wrong
    with pytest.raises(TrainingError, match="classes: masks/4.png"):
        PROBLEMS["segmentation"].check_targets(masks, OUTPUTS, lambda row: f"masks/{row}.png")
    with pytest.raises(TrainingError, match="row 4 of the batch"):
        PROBLEMS["segmentation"].check_targets(masks, OUTPUTS)
    with pytest.raises(TrainingError, match="whole numbers"):
        PROBLEMS["segmentation"].check_targets(masks.float(), OUTPUTS)


def test_pixels_without_a_class_count_in_nothing():
    made, logits, masks = (
        PROBLEMS["segmentation"],
        make_logits("segmentation"),
        make_targets("segmentation"),
    )
    before = made.loss(logits, masks), made.measure(logits, masks)
    other = masks.clone()
    other[:, 2] = 1
    assert made.loss(logits, other) != before[0]
    # Another image without any class at all.
    more = torch.full_like(masks[:1], UNLABELLED)
    both = torch.cat([logits, logits[:1]]), torch.cat([masks, more])
    torch.testing.assert_close(made.loss(*both), before[0])
    assert made.measure(*both) == pytest.approx(before[1])
    assert made.choices(logits[:1], more) is None


@pytest.mark.parametrize("name", OF_IMAGES)
def test_mirror_images_have_mirrored_targets_where_they_have_places(name):
    made, logits, targets = PROBLEMS[name], make_logits(name), make_targets(name)
    mirrored = made.mirror(targets)
    torch.testing.assert_close(made.mirror(mirrored), targets, rtol=0, atol=0, equal_nan=True)
    of_mirror = logits.flip(2) if name in OF_PIXELS else logits
    torch.testing.assert_close(made.loss(of_mirror, mirrored), made.loss(logits, targets))


def test_a_mask_lies_on_what_was_seen_of_its_image(monkeypatch):
    monkeypatch.setattr("restuning.problems.answers.NUMBERS_AT_ONCE", 60 * OUTPUTS * 7)
    made, logits = PROBLEMS["segmentation"], make_logits("segmentation")[0]
    said = made.answer(made.values(logits), logits, NAMES)
    assert said.mask.shape == (4, 4)
    whole = made.on_image(said, (50, 70), (0, 0, 70, 50)).mask
    large = torch.nn.functional.interpolate(
        logits.movedim(-1, 0)[None], (50, 70), mode="bilinear", align_corners=False
    )
    assert torch.equal(whole.long(), large[0].argmax(0))
    # Of a crop the edge has no answer, and what was added around an image is no part of it.
    inner = made.on_image(said, (50, 70), (10, -5, 60, 55))
    assert inner.mask.shape == (50, 70)
    assert (inner.mask == UNLABELLED).sum() == 50 * 20
    assert sum(share.share for share in inner.shares) == pytest.approx(1.0)
    assert [share.share for share in inner.shares] == sorted(
        (share.share for share in inner.shares), reverse=True
    )


@pytest.mark.parametrize("name", OF_IMAGES)
def test_answers_say_what_the_logits_say(name):
    made, logits = PROBLEMS[name], make_logits(name)
    values = made.values(logits, 2.0)
    assert values.dtype == torch.float32
    for row in range(3):
        said = made.answer(values[row], logits[row], NAMES)
        assert isinstance(said.label, str)
        assert all(isinstance(cell, str) for cell in said.words(2))
        json.dumps(said.to_json(2), allow_nan=False)


def test_several_labels_are_those_of_half_and_more():
    made, logits = MultiLabel(), torch.tensor([2.0, -1.0, 0.5])
    said = made.answer(made.values(logits), logits, NAMES)
    assert [choice.label for choice in said.tags] == ["a", "c"]
    assert said.label == "a, c"
    none = made.answer(made.values(-logits - 3), -logits - 3, NAMES)
    assert (none.label, none.tags) == ("-", ())


def test_numbers_come_back_in_their_units_with_their_error():
    made = PROBLEMS["regression"]
    targets = make_targets("regression")
    back = made.values(made.standardise(targets))
    torch.testing.assert_close(back, targets, rtol=1e-5, atol=1e-5)
    said = made.answer(torch.tensor([101.234, 0.5, -3.0]), torch.zeros(3), NAMES)
    assert said.numbers[0] == ("a", pytest.approx(101.234, abs=1e-4), 2.0)
    assert said.label == "a 101.2 ± 2.0, b 0.50 ± 0.10, c -3.000 ± 0.020"


def test_error_bars_are_the_root_of_the_mean_squared_residual():
    made = Regression([10.0], [2.0])
    told = made.with_errors(torch.zeros(4, 1), torch.tensor([[10.0], [13.0], [6.0], [10.0]]))
    assert told.error == pytest.approx((2.5,))
    assert told.without_errors() == made


def test_a_number_that_never_changes_is_not_divided_by_nothing():
    made = Regression.of(torch.tensor([[7.0, 1.0], [7.0, 3.0]]))
    assert made.deviation[0] == 1.0
    assert made.mean == (7.0, 2.0)
    with pytest.raises(TrainingError, match="no number"):
        Regression.of(torch.tensor([[float("nan")]]))


@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "regression", "mean": [0.0], "deviation": [0.0]},
        {"kind": "regression", "mean": [0.0, 1.0], "deviation": [1.0]},
        {"kind": "regression", "mean": [], "deviation": []},
        {"kind": "regression", "mean": [float("nan")], "deviation": [1.0]},
        {"kind": "regression", "mean": "0", "deviation": [1.0]},
        {"kind": "regression", "mean": [0.0], "deviation": [1.0], "error": [-1.0]},
        {"kind": "regression"},
        {"kind": "multi-label", "more": 1},
        {"kind": "embedding", "classes": 0, "dimensions": 3},
        {"kind": "embedding", "classes": 3},
        {"kind": "depth", "mean": 0.0, "deviation": 0.0},
        {"kind": "depth", "mean": 0.0, "deviation": 1.0, "error": -1.0},
        {"kind": "depth", "mean": 0.0, "deviation": 1.0, "window": [3]},
        {"kind": "segmentation", "window": [0, 3]},
        {"kind": "segmentation", "window": "ab"},
    ],
)
def test_specs_that_mean_nothing_are_refused(spec):
    with pytest.raises(FormatError):
        problem_from_spec(spec)


def test_an_unknown_kind_is_named():
    with pytest.raises(UnknownNameError, match="no problem of this kind"):
        problem_from_spec({"kind": "ranking"})


def test_a_stranger_s_problem_is_known_by_its_decorator():
    @problem("ordinal")
    class Ordinal(SingleLabel):
        pass

    try:
        assert problem_from_spec({"kind": "ordinal"}) == Ordinal()
        assert Ordinal() != SingleLabel()
    finally:
        del _REGISTRY._table["ordinal"]


@pytest.mark.parametrize("name", OF_IMAGES)
def test_a_task_keeps_its_problem_in_its_file_and_says_nothing_of_the_usual_one(
    name, host, tmp_path, images
):
    task = wake(build(name, host))
    save(task, host, tmp_path / "x.task", backbone="none")
    said = json.loads((tmp_path / "x.task" / "task.json").read_text())["task"]
    assert said.get("problem") == (None if name == "single-label" else task.problem.spec())
    again = load(tmp_path / "x.task", host)
    assert again.problem == task.problem
    assert again.side.problem == task.problem
    assert again.spec() == task.spec()
    assert torch.equal(Tuned(host, again)(images), Tuned(host, task)(images))


def test_a_problem_of_other_numbers_than_the_head_gives_is_refused(host):
    task = build("regression", host)
    with pytest.raises(FormatError, match="3 outputs"):
        task.problem = Regression([0.0], [1.0])
    assert len(task.problem.mean) == OUTPUTS


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_is_no_choice_has_no_probabilities(name, host):
    task, logits = build(name, host), make_logits(name)
    if task.problem.choices(logits, make_targets(name)) is None:
        with pytest.raises(WrongTaskError, match="no probabilities"):
            task.probabilities(logits)
    else:
        chances = task.probabilities(logits)
        assert ((chances >= 0) & (chances <= 1)).all()


def pairs(name, images):
    return list(zip(images, make_targets(name), strict=True))


@pytest.mark.parametrize("name", OF_IMAGES)
def test_a_run_that_is_killed_goes_on_and_ends_with_the_same_bits(name, host, images, tmp_path):
    data = pairs(name, images)
    settings = FitSettings(epochs=2, batch_size=5, lr=1e-2, checkpoint_every=2)

    def run(folder, data=data):
        tuned = Tuned(host, build(name, host))
        result = fit(
            tuned,
            data,
            data[:4],
            settings=settings,
            out=folder,
            collate=default_collate,
            progress=False,
        )
        return tuned.task, result

    class Killed(list):
        """Ends the process's run while the fourth batch is read."""

        seen = 0

        def __getitem__(self, index):
            Killed.seen += 1
            if Killed.seen == 18:
                raise KeyboardInterrupt
            return super().__getitem__(index)

        @property
        def contents(self):
            from restuning.data import identify

            return identify(list(self))

    whole, result = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", Killed(data))
    again, _ = run(tmp_path / "killed")
    for n, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[n])
    metric = PROBLEMS[name].metric
    assert result.metric == metric
    assert result.val_score == result.history[-1][f"val_{metric}"]
    loss = [entry["loss"] for entry in result.history]
    assert all(map(float, loss))


@pytest.mark.parametrize("name", OF_IMAGES)
def test_evaluation_depends_on_no_batches_and_takes_a_single_example(name, host, images):
    tuned, data = Tuned(host, wake(build(name, host))), pairs(name, images)
    metric = PROBLEMS[name].metric
    one, other = (evaluate(tuned, data, size) for size in (4, ROWS))
    assert one["count"] == ROWS
    for figure in (metric, "loss"):
        assert one[figure] == pytest.approx(other[figure], rel=1e-4, abs=SAME_TOLERANCE)
    single = evaluate(tuned, data[:1], 4)
    assert single["count"] == 1
    with pytest.raises(TrainingError, match="nothing to evaluate"):
        evaluate(tuned, [], 4)


def test_fewer_rows_than_processes_are_read_by_each_and_nobody_waits(host, images):
    tuned, data = Tuned(host, wake(build("regression", host))), pairs("regression", images)[:2]
    alone = evaluate(tuned, data)
    for rank in range(3):
        # It has nothing to reduce with: a process that met the others would fail here.
        of_three = SimpleNamespace(num_processes=3, process_index=rank)
        assert evaluate(tuned, data, accelerator=of_three) == alone


@pytest.mark.parametrize("name", ["multi-label", "regression"])
def test_training_on_nan_is_refused_before_a_step(name, host, images, tmp_path):
    data = pairs(name, images)
    data[7][1][1] = float("nan")
    task = build(name, host)
    before = copy.deepcopy(task.state_dict())
    with pytest.raises(TrainingError, match="a target is no number"):
        settings = FitSettings(epochs=1, batch_size=ROWS)
        fit(Tuned(host, task), data, settings=settings, out=tmp_path / "x", progress=False)
    assert all(torch.equal(t, before[n]) for n, t in task.state_dict().items())


def test_numbers_are_not_smoothed(host, images, tmp_path):
    settings = FitSettings(epochs=1, batch_size=4, label_smoothing=0.1)
    with pytest.raises(TrainingError, match="not smoothed"):
        fit(
            Tuned(host, build("regression", host)),
            pairs("regression", images),
            settings=settings,
            out=tmp_path / "x",
            progress=False,
        )


def test_a_bank_of_all_kinds_answers_as_each_alone_from_one_forward(host, images):
    tasks = {
        f"{name} {method}": wake(build(name, host, method, seed), seed)
        for seed, name in enumerate(OF_IMAGES)
        for method in ("res-tuning-bypass", "linear")
    }
    for task in tasks.values():
        task.pool = task.pool or host.readout_rule.pool
    bank, forwards = Bank(tasks), []
    handle = host.model.register_forward_hook(lambda *_: forwards.append(1))
    answers = bank(host.features(images, keep=bank.keep))
    assert len(forwards) == 1
    handle.remove()
    for name, task in tasks.items():
        alone = Tuned(host, task.eval())(images)
        torch.testing.assert_close(answers[name], alone, rtol=SAME_TOLERANCE, atol=SAME_TOLERANCE)
        values = task.values(answers[name])
        torch.testing.assert_close(values, task.values(alone), rtol=1e-4, atol=1e-4)


def test_a_task_without_a_problem_has_the_usual_one():
    assert isinstance(Task().problem, SingleLabel)
    assert isinstance(Task().problem, Problem)


# The closed form.


def draw_rows(name, rows=40, width=6):
    z = torch.randn(rows, width, generator=draw(7))
    signal = z[:, :OUTPUTS] + 0.5 * torch.randn(rows, OUTPUTS, generator=draw(8))
    if name == "multi-label":
        return z, (signal > 0.5).float()
    own = PROBLEMS["regression"]
    return z, signal * torch.tensor(own.deviation) + torch.tensor(own.mean)


def make_ridge(name, width=3, **options):
    network = Ridge(["block.0"], [width], OUTPUTS, grid=False, **options)
    network.problem = PROBLEMS[name]
    return network


@pytest.mark.parametrize("name", ["multi-label", "regression"])
@pytest.mark.parametrize("kept", [1000, 20])
def test_rows_left_out_are_answered_as_by_a_solution_without_them(name, kept, monkeypatch):
    """By the normal equations without each row, and whether all rows are held or products of features."""
    monkeypatch.setattr("restuning.bypass.sums.KEPT", kept)
    z, targets = draw_rows(name)
    network, made = make_ridge(name), PROBLEMS[name]
    left_out = network.fit(z, targets).double()
    y = made.columns(targets, OUTPUTS)
    scaled = z.double() / (z.double().std(0) * 6**0.5)
    exact = []
    for penalty in PENALTIES:
        rows = []
        for row in range(len(z)):
            at = torch.arange(len(z)) != row
            centre = scaled[at].mean(0)
            x = scaled[at] - centre
            gram = x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype)
            weight = torch.linalg.solve(gram, x.T @ (y[at] - y[at].mean(0)))
            rows.append((scaled[row] - centre) @ weight + y[at].mean(0))
        exact.append(torch.stack(rows))
    # One penalty and one scale explain all of them, a line for each output.
    middle = y.mean(0)
    off = min(
        float((left_out - scale * one - made.offset(middle, len(z), scale)).abs().max())
        for one in exact
        for scale in made.scales
    )
    assert off < CLOSED_TOLERANCE
    assert network.left_out_accuracy is None


@pytest.mark.parametrize("name", ["multi-label", "regression"])
def test_sums_of_columns_depend_on_no_order_and_no_shards(name):
    z, targets = draw_rows(name)
    y, keys = PROBLEMS[name].columns(targets, OUTPUTS), keys_of_numbers(range(len(z)))
    answers = []
    for order in (torch.arange(40), torch.arange(40).flip(0)):
        shards = [Sums(6, OUTPUTS, kept=12, columns=True) for _ in range(2)]
        for shard, part in zip(shards, order.split(25), strict=True):
            shard.add(z[part], y[part], keys[part])
        shards[0].merge(shards[1])
        assert shards[0].count == 40
        torch.testing.assert_close(shards[0].totals, y.sum(0))
        torch.testing.assert_close(shards[0].with_targets, y.T @ z.double())
        answers.append(solve(shards[0], [6], weighted=False, problem=PROBLEMS[name]).weight)
    torch.testing.assert_close(*answers)
    with pytest.raises(TunerShapeError, match="of classes only"):
        shards[0].remove(z[:1], y[:1], keys[:1])


@pytest.mark.parametrize("name", ["single-label", "multi-label", "regression"])
def test_the_gradient_of_the_weights_of_blocks_is_that_of_the_loss(name):
    made, rows = PROBLEMS[name], 12
    z = torch.randn(rows, 8, generator=draw(9), dtype=torch.double)
    blocks = torch.stack([(part @ part.mT).flatten() for part in z.split(4, 1)])
    truth = made.columns(make_targets(name), OUTPUTS)
    logs = torch.zeros(2, dtype=torch.double, requires_grad=True)
    scale = torch.full((1,), 0.7 if len(made.scales) > 1 else 0.0, dtype=torch.double)
    scale.requires_grad_()
    kernel = (logs.exp() @ blocks).view(rows, rows) + INTERCEPT + torch.eye(rows)
    inverse = torch.linalg.inv(kernel)
    left_out = truth - inverse @ (truth - truth.mean(0)) / inverse.diagonal()[:, None]
    middle = truth.mean(0)
    # The offset is a line in the scale.
    at_zero, at_one = (made.offset(middle, rows, scale) for scale in (0.0, 1.0))
    logits = scale.exp() * (left_out + at_one - at_zero) + at_zero
    loss = made.loss(logits, made.from_columns(truth)) / rows
    exact = torch.autograd.grad(loss, [logs, scale])
    with torch.no_grad():
        found = find_gradient(blocks, logs, scale, truth, made)
    torch.testing.assert_close(found[0], exact[0], rtol=1e-6, atol=1e-6)
    wanted = exact[1] if len(made.scales) > 1 else torch.zeros_like(exact[1])
    torch.testing.assert_close(found[1], wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((n, m) for n in ("multi-label", "regression", "embedding") for m in CLOSED),
        ("segmentation", "ridge"),
        ("segmentation", "mixing-bypass"),
        ("depth", "ridge"),
        ("depth", "mixing-bypass"),
        ("depth", "ensemble"),
    ],
)
def test_the_closed_form_answers_every_kind_and_in_a_bank_with_others(
    name, method, host, images, tmp_path
):
    task = build(name, host, method)
    tuned = Tuned(host, task)
    settings = FitSettings(epochs=1, batch_size=6)
    result = fit(
        tuned, pairs(name, images), settings=settings, out=tmp_path / "run", progress=False
    )
    metric = PROBLEMS[name].metric
    assert metric in result.history[-1]
    told = result.history[-1].get("left_out")
    assert (told is not None) == (name == "regression" or (name, method) == ("depth", "ridge"))
    save(task, host, tmp_path / "x.task", backbone="none")
    again = load(tmp_path / "x.task", host)
    others = {"classes": wake(build("single-label", host)), "this": again}
    for one in others.values():
        one.pool = one.pool or host.readout_rule.pool
    bank = Bank(others)
    answers = bank(host.features(images, keep=bank.keep))["this"]
    torch.testing.assert_close(answers, tuned.eval()(images), rtol=1e-4, atol=1e-4)


def test_weights_of_an_ensemble_have_the_lowest_loss_of_its_problem():
    targets = make_targets("regression", 200)
    made = PROBLEMS["regression"]
    right = made.standardise(targets)
    noise = torch.randn(200, OUTPUTS, generator=draw(10))
    weights = find_weights(torch.stack([right, noise]), targets, made)
    assert float(weights[0]) == pytest.approx(1.0, abs=0.05)
    assert float(weights[1]) < 0.05


@pytest.mark.parametrize("name", OF_IMAGES)
def test_the_lines_of_a_card_print_what_such_a_task_answers(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    backbone = load_backbone("restuning-tiny")
    folder = save_task(
        backbone,
        tmp_path / "own.task",
        "linear",
        labels=NAMES[: outputs_of(name)],
        problem=PROBLEMS[name],
        **({"pool": "grid"} if name in OF_PIXELS else {}),
    )
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    image = torch.randint(256, (3, 32, 32), generator=draw()).to(torch.uint8)
    exec(compile(code, "README.md", "exec"), {"inputs": [image]})  # noqa: S102
    assert capsys.readouterr().out.strip()
