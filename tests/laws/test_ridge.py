"""The closed-form classifier: the solution is the minimum, and rows left out were really left out."""

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings

from awake import tiny_vit, wake
from restuning import Bank, Host, Tuned, load, methods, save
from restuning._errors import TunerShapeError
from restuning.bypass import Ridge
from restuning.bypass.discriminant import (
    SHARES,
    answer_by_shares,
    deal_shares,
    fit_discriminants,
)
from restuning.bypass.solution import INTERCEPT, PENALTIES, find_gradient
from restuning.bypass.sums import keys_of_numbers
from zoo.table import NOT_YET, ZOO

CLOSED_TOLERANCE = 1e-4
"""Solved in double, kept in single precision, and logits are tens."""
EXACT = 1e-9
"""The same sums in double, in another order."""
BESIDE_TOLERANCE = 1e-4
"""A norm over other batches of rows rounds elsewhere, and weights are drawn large."""
NOT_WORSE = 0.02
"""Of 240 rows left out: four may be told otherwise by a weight that is not quite zero."""
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


def read_linearly(logits, answers):
    """How far logits are from any one linear map of answers, over their size."""
    ones = torch.cat([answers, torch.ones_like(answers[:, :1])], 1).double()
    best = ones @ torch.linalg.lstsq(ones, logits.double(), driver="gelsd").solution
    return float((best - logits).abs().max() / logits.abs().max())


@pytest.mark.parametrize(("rows", "width"), [(40, 6), (15, 30)])
def test_rows_left_out_are_answered_as_by_a_solution_without_them(rows, width):
    """By solving anew without each row, for more rows than features and for fewer."""
    inputs, labels = drawn(rows, width, 3)
    fitted = ridge([width // 2], classes=3)
    fitted.fit(inputs, labels)
    solution = fitted.solve_sums(fitted.sums)
    # The same scaling of inputs, which is of all rows by definition.
    scale = 1 / (inputs.double().std(0) * (width // 2 * 2) ** 0.5)
    z = inputs.double() * scale
    rows_out = []
    for row in keys_of_numbers(range(rows)).argsort().tolist():
        kept = torch.arange(rows) != row
        weight, bias = plainly(z[kept], labels[kept], 3, solution.penalty)
        rows_out.append(z[row] @ weight + bias)
    torch.testing.assert_close(solution.answers, torch.stack(rows_out), atol=EXACT, rtol=EXACT)


def test_its_answers_are_the_minimum_of_the_penalised_error():
    inputs, labels = drawn(50, 8, 4)
    fitted = ridge([4], classes=4)
    fitted.fit(inputs, labels)
    z = inputs.double() / (inputs.double().std(0) * 8**0.5)
    answers = F.linear(inputs, fitted.weight, fitted.bias)
    found = []
    for penalty in PENALTIES:
        weight, bias = plainly(z, labels, 4, penalty)
        found.append(read_linearly(answers, z @ weight + bias))
    assert min(found) < CLOSED_TOLERANCE


def test_answers_to_rows_left_out_are_no_better_than_chance_on_random_labels():
    inputs, _ = drawn(400, 500, 2)
    labels = torch.randint(2, (400,), generator=torch.Generator().manual_seed(1))
    fitted = ridge([250], classes=2)
    left_out = fitted.fit(inputs, labels)
    # Five standard deviations of a fair coin thrown 400 times.
    assert abs(float((left_out.argmax(1) == labels).float().mean()) - 0.5) < 0.125


def test_a_class_between_others_is_told_from_them():
    """Least squares never says so: on a line the middle one is the largest answer nowhere."""
    draw = torch.Generator().manual_seed(2)
    labels = torch.arange(200) % 4
    inputs = torch.randn(200, 8, generator=draw)
    inputs[:, 0] = labels + inputs[:, 0] / 5
    fitted = ridge([4], classes=4)
    fitted.fit(inputs, labels)
    solution = fitted.solve_sums(fitted.sums)
    plain = (solution.answers.argmax(1) == solution.kept.labels).float().mean()
    assert float(plain) < 0.75
    assert fitted.left_out_accuracy > 0.95
    answered = F.linear(inputs, fitted.weight, fitted.bias).argmax(1) == labels
    assert float(answered.float().mean()) > 0.95


def test_discriminants_of_shares_have_not_seen_them():
    """By solving, leaving out and fitting anew without each share."""
    inputs, labels = drawn(60, 8, 3)
    z, truth = inputs.double(), F.one_hot(labels, 3).double()
    weight, bias = plainly(z, labels, 3, 0.3)
    centred = z - z.mean(0)
    own = centred @ torch.linalg.inv(centred.T @ centred + 0.3 * torch.eye(8)) @ centred.T + 1 / 60
    shares = deal_shares(labels, torch.arange(60))
    assert all(int(n) == 4 for n in torch.bincount(shares * 3 + labels))
    found = answer_by_shares(truth, truth - (z @ weight + bias), own, shares)
    for share in range(SHARES):
        out = shares == share
        others, right = z[~out], labels[~out]
        answers = []
        for row in range(len(others)):
            kept = torch.arange(len(others)) != row
            weight, bias = plainly(others[kept], right[kept], 3, 0.3)
            answers.append(others[row] @ weight + bias)
        weight, bias = plainly(others, right, 3, 0.3)
        asked = z[out] @ weight + bias
        made = fit_discriminants(torch.stack(answers), right)
        for each, (weight, bias) in zip(found, made, strict=True):
            torch.testing.assert_close(each[out], asked @ weight.T + bias, atol=EXACT, rtol=EXACT)


def test_rows_that_are_there_twice_are_of_one_share():
    labels = torch.tensor([0, 0, 1, 0, 0, 0, 1, 1, 1, 0])
    keys = torch.tensor([3, 3, 4, 8, 8, 8, 9, 9, 12, 20])
    shares = deal_shares(labels, keys)
    assert all(len(set(shares[keys == key].tolist())) == 1 for key in keys)
    # Of class 0 three different rows, one after the other from the share that its first key says.
    assert [int(shares[keys == key][0]) for key in (3, 8, 20)] == [3, 4, 0]


def test_of_many_classes_with_random_labels_no_discriminant_is_believed():
    """Made of answers to rows left out one at a time, one would look far better than it is."""
    inputs, _ = drawn(400, 300, 2)
    labels = torch.randint(40, (400,), generator=torch.Generator().manual_seed(4))
    fitted = ridge([150], classes=40)
    share = float((fitted.fit(inputs, labels).argmax(1) == labels).float().mean())
    # Five standard deviations of 400 throws.
    assert share < 1 / 40 + 5 * (1 / 40 * 39 / 40 / 400) ** 0.5


def in_blocks(count, width, classes, **options):
    taps = [f"block.{k}" for k in range(count)]
    blocks = [("mean", tap) for tap in taps]
    return Ridge(taps, [width] * count, classes, grid=False, blocks=blocks, **options)


@pytest.mark.parametrize("classes", [2, 10])
def test_weights_of_blocks_learn_nothing_from_random_labels(classes):
    """They are drawn together: 55 free weights would answer 70 of 100 left out of two classes right."""
    draw = torch.Generator().manual_seed(3)
    inputs = torch.randn(400, 55 * 8, generator=draw)
    labels = torch.randint(classes, (400,), generator=draw)
    left_out = in_blocks(55, 8, classes, weighted=True).fit(inputs, labels)
    share = float((left_out.argmax(1) == labels).float().mean())
    # Five standard deviations of 400 throws.
    assert abs(share - 1 / classes) < 5 * (1 / classes * (1 - 1 / classes) / 400) ** 0.5


def test_the_block_that_tells_has_most_of_the_weight():
    draw = torch.Generator().manual_seed(1)
    told, labels = drawn(300, 8, 4)
    noise = torch.randn(300, 9 * 8, generator=draw)
    inputs = torch.cat([noise[:, :32], told, noise[:, 32:]], 1)
    alike, weighted = (in_blocks(10, 8, 4, weighted=w) for w in (False, True))
    answers = [each.fit(inputs, labels) for each in (alike, weighted)]
    losses = [float(F.cross_entropy(a, labels)) for a in answers]
    assert losses[1] < losses[0]
    sizes = weighted.weight.square().sum(0).view(10, 8).sum(1)
    assert int(sizes.argmax()) == 4


def test_the_gradient_of_weights_is_that_of_autograd():
    inputs, labels = drawn(30, 24, 3)
    z = ((inputs - inputs.mean(0)) / inputs.std(0) / 8**0.5).double()
    truth = F.one_hot(labels, 3).double()
    blocks = torch.stack([(b @ b.mT).flatten() for b in z.split(8, 1)])
    logs = torch.tensor([-1.0, 0.5, 0.2], dtype=torch.double, requires_grad=True)
    scale = torch.tensor([0.7], dtype=torch.double, requires_grad=True)
    kernel = (logs.exp() @ blocks).view(30, 30) + INTERCEPT + torch.eye(30)
    inverse = torch.linalg.inv(kernel)
    left_out = truth - inverse @ (truth - truth.mean(0)) / inverse.diagonal()[:, None]
    exact = torch.autograd.grad(F.cross_entropy(scale.exp() * left_out, labels), [logs, scale])
    with torch.no_grad():
        found = find_gradient(blocks, logs, scale, truth)
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, theirs, atol=EXACT, rtol=EXACT)


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


def test_rows_beyond_those_that_are_kept_count_and_are_left_out_as_well(monkeypatch):
    """By solving anew without each row: all of them are in the solution, whichever are kept."""
    monkeypatch.setattr("restuning.bypass.sums.KEPT", 60)
    inputs, labels = drawn(100, 8, 3)
    fitted = ridge([4], classes=3)
    answers = fitted.fit(inputs, labels)
    assert fitted.sums.products is not None
    assert len(fitted.sums.kept_rows().keys) == 60
    scale = 1 / (inputs.double().std(0) * 8**0.5)
    z = inputs.double() * scale
    penalty, out = fitted.solve_sums(fitted.sums).penalty, []
    for row in range(100):
        others = torch.arange(100) != row
        weight, bias = plainly(z[others], labels[others], 3, penalty)
        out.append(z[row] @ weight + bias)
    kept = set(fitted.sums.kept_rows().keys.tolist())
    rest = [n for n, key in enumerate(keys_of_numbers(range(100)).tolist()) if key not in kept]
    assert read_linearly(answers[rest], torch.stack(out)[rest]) < CLOSED_TOLERANCE


@pytest.mark.parametrize("labels", [torch.tensor([0]), torch.tensor([0, 3]), torch.tensor([-1, 0])])
def test_labels_it_cannot_be_solved_for_are_refused_in_words(labels):
    with pytest.raises(TunerShapeError, match="cannot be solved"):
        ridge([4]).fit(torch.randn(len(labels), 8), labels)


def test_every_tap_needs_a_width():
    with pytest.raises(TunerShapeError, match="2 taps, 1 widths"):
        Ridge(["block.1", "block.2"], [4], 3)


@pytest.mark.parametrize("name", sorted(set(ZOO) - set(NOT_YET)))
def test_it_runs_on_any_backbone_and_reads_what_training_reads(name):
    model, args, kwargs = ZOO[name][0]()
    host = Host(wake(model), *args, **kwargs)
    task = methods.build("ridge", host, num_classes=3)
    with torch.no_grad():
        task.side.weight.normal_()
    taps = host.features(*args, keep=task.needs(host.readout_rule), **kwargs)
    logits = Tuned(host, task)(*args, **kwargs)
    exact = F.linear(task.side.inputs(taps), task.side.weight, task.side.bias)
    torch.testing.assert_close(logits, exact, atol=SAME_TOLERANCE, rtol=SAME_TOLERANCE)
    handed = dict(taps) | {task.side.name: torch.ones(len(logits), 3)}
    assert torch.equal(task(handed, host.readout), torch.ones(len(logits), 3))


@pytest.mark.parametrize("name", sorted(set(ZOO) - set(NOT_YET)))
def test_beside_a_task_that_reads_all_tokens_it_answers_as_alone(name):
    """A bank then keeps all tokens, of which it must find its own: the last one of a decoder, say."""
    model, args, kwargs = ZOO[name][0]()
    host = Host(wake(model), *args, **kwargs)
    for pool in {"mean", "cls", "last", host.readout_rule.pool} - {"own"}:
        task = methods.build("ridge", host, num_classes=3, pool=pool).eval()
        with torch.no_grad():
            task.side.weight.normal_(generator=torch.Generator().manual_seed(0))
        linear = methods.build("linear", host, num_classes=3, pool="mean").eval()
        bank = Bank({"ridge": task, "linear": linear})
        answers = bank(host.features(*args, keep=bank.keep, **kwargs))
        for name_of, each in (("ridge", task), ("linear", linear)):
            alone = Tuned(host, each)(*args, **kwargs)
            torch.testing.assert_close(
                answers[name_of], alone, atol=SAME_TOLERANCE, rtol=BESIDE_TOLERANCE
            )


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


TOKEN = [("token", "block.0")]


def started(head, rows=60, width=4, classes=3):
    """One that starts from a head, taps that say nothing, and the feature that the head reads."""
    draw = torch.Generator().manual_seed(1)
    start = ("cls", head.in_features)
    made = Ridge(["block.0"], [width], classes, blocks=TOKEN, start=start)
    made.start_from(head)
    labels = torch.arange(rows) % classes
    feature = F.one_hot(labels, head.in_features).float()
    feature += 0.3 * torch.randn(feature.shape, generator=draw)
    tokens = torch.randn(rows, 5, width, generator=draw)
    return made, {"block.0": tokens, "feature/cls": feature[:, None]}, labels


def head_of(weight):
    head = torch.nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.zero_()
    return head


def test_what_a_head_knew_before_is_answered_before_and_kept_after():
    """Where taps say nothing and the head is right, it is as right after a few rows as it was."""
    head = head_of(20 * torch.eye(3, 6))
    # Too few of a class for a discriminant, which reads each row by what others of its share say.
    made, taps, labels = started(head, rows=8)
    torch.testing.assert_close(made(taps), head(taps["feature/cls"][:, 0]))
    left_out, _ = made.solve([(taps, labels)])
    assert (left_out.argmax(1) == made.sums.kept_rows().labels).all()
    assert (made(taps).argmax(1) == labels).all()
    solution = made.solve_sums(made.sums)
    assert solution.start > 0
    rows = solution.kept
    torch.testing.assert_close(
        solution.leave_out(rows.rows, rows.labels), solution.left_out, atol=EXACT, rtol=EXACT
    )


def test_a_head_that_knows_nothing_hardly_counts():
    draw = torch.Generator().manual_seed(3)
    head = head_of(20 * torch.randn(3, 6, generator=draw))
    made, taps, labels = started(head, rows=240)
    taps["block.0"][:, 0, :3] += 2 * F.one_hot(labels, 3)
    made.solve([(taps, labels)])
    with_head = made.left_out_accuracy
    plain = Ridge(["block.0"], [4], 3, blocks=TOKEN)
    plain.solve([(taps, labels)])
    assert with_head >= plain.left_out_accuracy - NOT_WORSE


def test_one_that_starts_from_a_head_comes_back_from_its_file_with_it(tmp_path):
    host = Host(tiny_vit(depth=2, embed_dim=16, num_heads=2), torch.zeros(1, 3, 32, 32))
    head = head_of(torch.randn(3, host.dim))
    task = methods.build("ridge", host, head=head)
    x = torch.randn(5, 3, 32, 32)
    before = Tuned(host, task)(x)
    torch.testing.assert_close(before, head(host.model(x)), atol=SAME_TOLERANCE, rtol=0)
    save(task, host, tmp_path / "a.task")
    torch.testing.assert_close(Tuned(host, load(tmp_path / "a.task", host))(x), before)
