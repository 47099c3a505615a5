"""The closed-form classifier: the solution is the minimum, and rows left out were really left out."""

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings

from awake import tiny_vit, wake
from restuning import Bank, Host, Tuned, load, methods, save
from restuning._errors import NoSitesError, TunerShapeError
from restuning.bypass import Ridge
from restuning.bypass.ridge import PENALTIES
from zoo.table import NOT_YET, ZOO

CLOSED_TOLERANCE = 1e-4
"""Solved in double, kept in single precision, and logits are tens."""
SAME_TOLERANCE = 1e-5
"""Products of other batch sizes round elsewhere."""


def drawn(rows, features, classes, seed=0):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % classes
    centres = torch.randn(classes, features, generator=draw)
    return centres[labels] + torch.randn(rows, features, generator=draw), labels


def ridge(dims, classes=3, **options):
    return Ridge([f"block.{k}" for k in range(len(dims))], dims, classes, grid=False, **options)


def plainly(inputs, labels, classes, penalty):
    """Weights and bias by the normal equations with an unpenalised intercept."""
    z, y = inputs.double(), F.one_hot(labels, classes).double()
    centre = z.mean(0)
    gram = (z - centre).T @ (z - centre) + penalty * torch.eye(z.shape[1], dtype=z.dtype)
    weight = torch.linalg.solve(gram, (z - centre).T @ (y - y.mean(0)))
    return weight, y.mean(0) - centre @ weight


@pytest.mark.parametrize(("rows", "width"), [(40, 6), (15, 30)])
def test_rows_left_out_are_answered_as_by_a_solution_without_them(rows, width):
    """By solving anew without each row, for more rows than features and for fewer."""
    inputs, labels = drawn(rows, width, 3)
    fitted = ridge([width // 2], classes=3)
    left_out = fitted.fit(inputs, labels)
    # The same scaling of inputs, which is of all rows by definition.
    scale = 1 / (inputs.double().std(0) * (width // 2 * 2) ** 0.5)
    z = inputs.double() * scale
    candidates = []
    for penalty in PENALTIES:
        rows_out = []
        for row in range(rows):
            kept = torch.arange(rows) != row
            weight, bias = plainly(z[kept], labels[kept], 3, penalty)
            rows_out.append(z[row] @ weight + bias)
        candidates.append(torch.stack(rows_out))
    # One penalty and one scale explain all of them; which, the losses decide.
    ratios = [(left_out.double() / c) for c in candidates]
    spread = [float((r - r.median()).abs().max()) / float(r.median().abs()) for r in ratios]
    assert min(spread) < CLOSED_TOLERANCE


def test_its_answers_are_the_minimum_of_the_penalised_error():
    inputs, labels = drawn(50, 8, 4)
    fitted = ridge([4], classes=4)
    fitted.fit(inputs, labels)
    z = inputs.double() / (inputs.double().std(0) * 8**0.5)
    answers = F.linear(inputs, fitted.weight, fitted.bias)
    found = []
    for penalty in PENALTIES:
        weight, bias = plainly(z, labels, 4, penalty)
        exact = z @ weight + bias
        ratio = answers.double() / exact
        found.append(float((ratio - ratio.median()).abs().max() / ratio.median().abs()))
    assert min(found) < CLOSED_TOLERANCE


def test_answers_to_rows_left_out_are_no_better_than_chance_on_random_labels():
    inputs, _ = drawn(400, 500, 2)
    labels = torch.randint(2, (400,), generator=torch.Generator().manual_seed(1))
    fitted = ridge([250], classes=2)
    left_out = fitted.fit(inputs, labels)
    # Five standard deviations of a fair coin thrown 400 times.
    assert abs(float((left_out.argmax(1) == labels).float().mean()) - 0.5) < 0.125
    seen = F.linear(inputs, fitted.weight, fitted.bias).argmax(1)
    assert float((seen == labels).float().mean()) > 0.6


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(2, 30),
    width=st.integers(1, 12),
    classes=st.integers(1, 5),
    constant=st.booleans(),
)
def test_any_number_of_rows_features_and_classes_gives_finite_answers(
    rows, width, classes, constant
):
    inputs, labels = drawn(rows, 2 * width, classes)
    if constant:
        inputs[:, 0] = 3.0
    fitted = ridge([width], classes=classes)
    assert fitted.fit(inputs, labels).isfinite().all()
    assert fitted.weight.isfinite().all()
    assert fitted.bias.isfinite().all()


def test_of_more_rows_than_are_solved_for_the_rest_is_answered_as_new_rows_are(monkeypatch):
    monkeypatch.setattr("restuning.bypass.ridge.MOST_ROWS", 60)
    inputs, labels = drawn(100, 8, 3)
    fitted = ridge([4], classes=3)
    answers = fitted.fit(inputs, labels)
    as_new = F.linear(inputs, fitted.weight, fitted.bias)
    same = (answers - as_new).abs().amax(1) < 1e-6
    assert int(same.sum()) == 40
    assert answers.isfinite().all()


@pytest.mark.parametrize("labels", [torch.tensor([0]), torch.tensor([0, 3]), torch.tensor([-1, 0])])
def test_labels_it_cannot_be_solved_for_are_refused_in_words(labels):
    with pytest.raises(TunerShapeError, match="cannot be solved"):
        ridge([4]).fit(torch.randn(len(labels), 8), labels)


def test_every_tap_needs_a_width():
    with pytest.raises(TunerShapeError, match="2 taps, 1 widths"):
        Ridge(["block.1", "block.2"], [4], 3)


@pytest.mark.parametrize("name", sorted(set(ZOO) - set(NOT_YET)))
def test_it_runs_on_any_backbone_of_images_and_reads_what_training_reads(name):
    model, args, kwargs = ZOO[name][0]()
    host = Host(wake(model), *args, **kwargs)
    if not host.images:
        with pytest.raises(NoSitesError, match="takes no images"):
            methods.build("ridge", host, num_classes=3)
        return
    task = methods.build("ridge", host, num_classes=3)
    with torch.no_grad():
        task.side.weight.normal_()
    taps = host.features(*args, keep=task.needs(host.readout_rule), **kwargs)
    logits = Tuned(host, task)(*args, **kwargs)
    exact = F.linear(task.side.inputs(taps), task.side.weight, task.side.bias)
    torch.testing.assert_close(logits, exact, atol=SAME_TOLERANCE, rtol=SAME_TOLERANCE)
    handed = dict(taps) | {task.side.name: torch.ones(len(logits), 3)}
    assert torch.equal(task(handed, host.readout), torch.ones(len(logits), 3))


def test_it_is_saved_loaded_and_answers_in_a_bank(tmp_path):
    host = Host(tiny_vit(), torch.zeros(1, 3, 32, 32))
    tasks = {
        name: methods.build(name, host, num_classes=3, **options).eval()
        for name, options in (("ridge", {}), ("mixing-bypass", {"width": 8, "heads": 2, "rank": 8}))
    }
    x = torch.randn(2, 3, 32, 32)
    for name, task in tasks.items():
        wake(task)
        if isinstance(task.side, Ridge):
            task.side.weight.normal_()
        save(task, host, tmp_path / f"{name}.task", backbone="tiny")
        again = load(tmp_path / f"{name}.task", host).eval()
        assert torch.equal(Tuned(host, again)(x), Tuned(host, task)(x))
    bank = Bank(tasks)
    answers = bank(host.features(x, keep=bank.keep))
    for name, task in tasks.items():
        torch.testing.assert_close(
            answers[name], Tuned(host, task)(x), atol=SAME_TOLERANCE, rtol=SAME_TOLERANCE
        )
