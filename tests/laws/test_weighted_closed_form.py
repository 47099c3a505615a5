"""Closed forms with weights of classes: each row counts as often as its class weighs, in the solution and in what chooses."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from restuning._errors import TrainingError, TunerShapeError
from restuning.bypass import GridRidge, Ridge
from restuning.bypass.discriminant import (
    SHARES,
    answer_by_shares,
    deal_shares,
    fit_discriminants,
)
from restuning.bypass.grid_ridge import _find_scale, _solve
from restuning.bypass.solution import INTERCEPT, find_gradient, solve
from restuning.bypass.sums import Sums, keys_of_rows
from restuning.problems import UNLABELLED, MultiLabel, Segmentation, SingleLabel

EXACT = 1e-9
"""The same sums in double, in another order."""
EQUAL = 1e-6
"""Of the largest number, in double: the same sums in another order, and a solution of them."""
WIDTH, CLASSES, KINDS = 8, 3, [4, 4]
MANY, FEW = 10_000, 20
"""Rows that are kept: more than there are, and fewer, so that products take their place."""
WEIGHTS = torch.tensor([0.5, 2.0, 7.0])


def drawn(count=60, seed=0, offset=20.0):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(torch.tensor([0.7, 0.2, 0.1]), count, True, generator=draw)
    labels[:6] = torch.arange(6) % CLASSES
    rows = torch.randn(count, WIDTH, generator=draw, dtype=torch.double) + offset
    return rows + 1.5 * F.one_hot(labels, WIDTH), labels


def of(rows, labels, kept=MANY, batch=17, weights=WEIGHTS):
    made = Sums(WIDTH, CLASSES, kept=kept, dtype=torch.double, weights=weights)
    for part in zip(rows.split(batch), labels.split(batch), strict=True):
        made.add(*part)
    return made


def plainly(z, y, weights, penalty):
    """Weights and bias of a ridge whose rows count so much, with an unpenalised intercept, by its normal equations."""
    ones = torch.cat([z, z.new_ones(len(z), 1)], 1)
    system = ones.T @ (ones * weights[:, None])
    system.diagonal()[:-1].add_(penalty)
    found = torch.linalg.solve(system, ones.T @ (y * weights[:, None]))
    return found[:-1], found[-1]


def scale_of(rows, weights):
    mean = weights @ rows / weights.sum()
    variance = weights @ (rows - mean).square() / weights.sum() * len(rows) / (len(rows) - 1)
    # Every kind of features has the same length, and both blocks have the same weight.
    return 1 / (variance * 4 * 2).sqrt()


@pytest.mark.parametrize("count", [60, 7])
def test_rows_left_out_are_answered_as_by_a_weighted_ridge_without_them(count):
    """For more rows than features and for fewer."""
    rows, labels = drawn(count)
    sums = of(rows, labels)
    solution = solve(sums, KINDS, weighted=False)
    kept = solution.kept
    weights = WEIGHTS.double()[kept.labels]
    z, y = kept.rows * scale_of(kept.rows, weights), F.one_hot(kept.labels, CLASSES).double()
    wanted = []
    for row in range(count):
        others = torch.arange(count) != row
        weight, bias = plainly(z[others], y[others], weights[others], solution.penalty)
        wanted.append(z[row] @ weight + bias)
    torch.testing.assert_close(solution.answers, torch.stack(wanted), atol=EQUAL, rtol=EQUAL)
    # And where a row is met again: what is read of the same answers.
    again = solution.leave_out(kept.rows, kept.labels)
    assert_read_of(again, solution.answers)


def assert_read_of(logits, answers):
    """That logits are one linear map of answers."""
    ones = torch.cat([answers, torch.ones_like(answers[:, :1])], 1)
    read = ones @ torch.linalg.lstsq(ones, logits, driver="gelsd").solution
    torch.testing.assert_close(read, logits, atol=EQUAL, rtol=EQUAL)


def test_the_whole_is_a_weighted_ridge_of_all_rows():
    rows, labels = drawn()
    solution = solve(of(rows, labels), KINDS, weighted=False)
    weights = WEIGHTS.double()[labels]
    z, y = rows * scale_of(rows, weights), F.one_hot(labels, CLASSES).double()
    weight, bias = plainly(z, y, weights, solution.penalty)
    assert_read_of(rows @ solution.weight.T + solution.bias, z @ weight + bias)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
def test_products_any_order_and_shards_say_what_the_rows_say(weighted, shards):
    rows, labels = drawn()
    held = of(rows, labels)
    parts = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).chunk(shards)
    first, *others = [of(rows[part], labels[part], batch=9) for part in parts]
    first._form_products()
    for other in others:
        first.merge(other)
    one, other = (solve(each, KINDS, weighted=weighted) for each in (held, first))
    assert one.penalty == other.penalty and one.shrinkage == other.shrinkage
    for name in ("weight", "bias", "answers", "left_out", "shares"):
        ours, theirs = getattr(one, name), getattr(other, name)
        assert float((ours - theirs).abs().max()) <= EQUAL * max(1, float(theirs.abs().max()))


def test_products_are_the_same_whenever_they_are_begun():
    rows, labels = drawn()
    late, early = of(rows, labels, FEW), of(rows, labels, FEW, batch=60)
    formed = of(rows, labels)
    formed._form_products()
    for each in (late, early):
        torch.testing.assert_close(each.products, formed.products, atol=EQUAL, rtol=EQUAL)
        torch.testing.assert_close(each.mean, formed.mean)


def test_weights_of_one_say_what_no_weights_say():
    rows, labels = drawn()
    one = solve(of(rows, labels, weights=torch.ones(CLASSES)), KINDS, weighted=True)
    other = solve(of(rows, labels, weights=None), KINDS, weighted=True)
    assert one.penalty == other.penalty
    for name in ("weight", "bias", "left_out"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=EQUAL, rtol=EQUAL)


def test_discriminants_of_shares_have_not_seen_them_and_are_weighed():
    """By solving, leaving out and fitting anew without each share."""
    rows, labels = drawn(offset=0.0)
    weights = WEIGHTS.double()
    own, y = weights[labels], F.one_hot(labels, CLASSES).double()
    weight, bias = plainly(rows, y, own, 0.3)
    apart = (rows - own @ rows / own.sum()) * own.sqrt()[:, None]
    shared = apart @ torch.linalg.inv(apart.T @ apart + 0.3 * torch.eye(WIDTH)) @ apart.T
    shared += own.sqrt()[:, None] * own.sqrt() / own.sum()
    shares = deal_shares(labels, torch.arange(len(rows)))
    found = answer_by_shares(y, y - (rows @ weight + bias), shared, shares, weights)
    for share in range(SHARES):
        out = shares == share
        z, truth, counts = rows[~out], y[~out], own[~out]
        left = []
        for row in range(len(z)):
            others = torch.arange(len(z)) != row
            solved = plainly(z[others], truth[others], counts[others], 0.3)
            left.append(z[row] @ solved[0] + solved[1])
        weight, bias = plainly(z, truth, counts, 0.3)
        asked = rows[out] @ weight + bias
        made = fit_discriminants(torch.stack(left), labels[~out], weights)
        for each, (read, added) in zip(found, made, strict=True):
            torch.testing.assert_close(each[out], asked @ read.T + added, atol=EQUAL, rtol=EQUAL)


def test_a_discriminant_is_that_of_rows_which_are_there_so_often():
    rows, labels = drawn(offset=0.0)
    answers, times = rows[:, :CLASSES], torch.tensor([1, 2, 7])
    often = times[labels]
    repeated = fit_discriminants(
        answers.repeat_interleave(often, 0), labels.repeat_interleave(often)
    )
    weighed = fit_discriminants(answers, labels, times.double())
    for ours, theirs in zip(weighed, repeated, strict=True):
        torch.testing.assert_close(ours[0], theirs[0], atol=EXACT, rtol=EXACT)
        torch.testing.assert_close(ours[1], theirs[1], atol=EXACT, rtol=EXACT)


def test_the_gradient_of_weights_of_blocks_is_that_of_autograd():
    rows, labels = drawn(30, offset=0.0)
    own = WEIGHTS.double()[labels]
    truth = F.one_hot(labels, CLASSES).double()
    blocks = torch.stack([(b @ b.mT).flatten() for b in rows.split(4, 1)])
    logs = torch.tensor([-1.0, 0.5], dtype=torch.double, requires_grad=True)
    scale = torch.tensor([0.7], dtype=torch.double, requires_grad=True)
    kernel = (logs.exp() @ blocks).view(30, 30) + INTERCEPT + torch.diag(1 / own)
    inverse = torch.linalg.inv(kernel)
    left_out = truth - inverse @ (truth - truth.mean(0)) / inverse.diagonal()[:, None]
    loss = F.cross_entropy(scale.exp() * left_out, labels, WEIGHTS.double())
    exact = torch.autograd.grad(loss, [logs, scale])
    with torch.no_grad():
        found = find_gradient(blocks, logs, scale, truth, None, own)
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, theirs, atol=EXACT, rtol=EXACT)


def test_weighed_sums_are_neither_written_nor_changed_nor_mixed_with_others():
    rows, labels = drawn()
    sums = of(rows, labels)
    keys = keys_of_rows(rows)
    for change in (
        lambda: sums.remove(rows[:2], labels[:2], keys[:2]),
        lambda: sums.set_classes([0, 1, 2, None]),
        sums.tensors,
    ):
        with pytest.raises(TunerShapeError, match="weighed by their class"):
            change()
    with pytest.raises(TunerShapeError, match="other weights"):
        sums.merge(of(rows, labels, weights=None))
    for wrong in (torch.ones(2), torch.zeros(CLASSES)):
        with pytest.raises(TunerShapeError, match="above 0"):
            of(rows, labels, weights=wrong)


def test_a_rare_class_gains_recall():
    draw = torch.Generator().manual_seed(0)
    labels = (torch.arange(400) % 20 == 0).long()
    inputs = torch.randn(400, WIDTH, generator=draw) + labels[:, None]
    recalls = []
    for weights in (None, SingleLabel().balance(labels, 2)):
        network = Ridge(["block.0"], [WIDTH // 2], 2, grid=False)
        network.weigh(weights)
        network.fit(inputs, labels)
        told = F.linear(inputs, network.weight, network.bias).argmax(1)
        recalls.append(float((told == labels)[labels == 1].float().mean()))
    assert recalls[1] > recalls[0]
    assert recalls[1] > 0.8


def test_of_several_labels_each_would_ask_for_a_solution_of_its_own():
    network = Ridge(["block.0"], [WIDTH], 2, grid=False)
    network.problem = MultiLabel()
    network.weigh(None)
    with pytest.raises(TrainingError, match="multi-label"):
        network.weigh(torch.ones(2, 2))


def masks(images=9, side=4, patch=4):
    draw = torch.Generator().manual_seed(0)
    classes = torch.multinomial(
        torch.tensor([0.8, 0.15, 0.05]), images * side**2, True, generator=draw
    )
    classes = classes.view(images, side, side)
    means = torch.randn(CLASSES, WIDTH, generator=draw)
    maps = means[classes] + 0.8 * torch.randn(images, side, side, WIDTH, generator=draw)
    drawn = classes.repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    # Patches of several classes, and pixels without one.
    drawn = drawn.roll(1, 1)
    drawn[:, :, :1] = UNLABELLED
    return {"block.1": maps}, drawn.to(torch.uint8)


def of_patches(weights, parts=2):
    network = GridRidge(["block.1"], [WIDTH], CLASSES, parts)
    network.problem = Segmentation()
    network.weigh(weights)
    return network


def test_patches_are_solved_as_a_weighted_ridge_whose_rows_are_places():
    taps, truth = masks()
    network = of_patches(WEIGHTS)
    products, with_truth, _ = network._collect([(taps, truth)])
    products, with_truth = products.sum(0), with_truth.sum(0)
    scale = _find_scale(products)
    weight, bias = _solve(products, with_truth, scale, 0.7)
    # A place counts by its pixels that have a class, each as much as its class.
    z = network.inputs(taps).flatten(0, 2).double()
    pixels = Segmentation().columns(truth, CLASSES)
    blocks = pixels.unfold(1, 4, 4).unfold(2, 4, 4).movedim(3, -1).flatten(0, 2)
    counts = blocks.sum((1, 2))
    own = (counts * WEIGHTS).sum(1) / 16
    # What a part of a place is wanted to answer: its pixels of a class over all that are known in the place.
    of_parts = blocks.unflatten(1, (2, 2)).unflatten(3, (2, 2)).sum((2, 4))
    wanted = of_parts.flatten(1, 2) / (counts.sum(1) / 4).clamp(min=1)[:, None, None]
    wanted = wanted.movedim(-1, 1).flatten(1)
    assert float(own.min()) > 0
    plain = plainly(z * scale, wanted, own, 0.7)
    torch.testing.assert_close(weight, plain[0] * scale[:, None], atol=EQUAL, rtol=EQUAL)
    torch.testing.assert_close(bias, plain[1], atol=EQUAL, rtol=EQUAL)


def test_of_patches_a_rare_class_gains_recall():
    taps, truth = masks(30)
    problem, recalls = Segmentation(), []
    for weights in (None, problem.balance(truth, CLASSES)):
        network = of_patches(weights, parts=1)
        network.solve([(taps, truth)])
        told = problem.draw(network(taps), truth)
        recalls.append(float((told == truth)[truth == 2].float().mean()))
    assert recalls[1] > recalls[0] + 0.1
