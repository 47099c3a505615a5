"""The solution of a linear classifier from sums, and what it would answer to each row left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from restuning._errors import TunerShapeError
from restuning.bypass.discriminant import (
    A_CLASS,
    SHRINKAGES,
    answer_by_shares,
    deal_shares,
    fit_discriminants,
)
from restuning.bypass.stacking import find_weights
from restuning.bypass.sums import TOGETHER as AT_A_TIME
from restuning.bypass.sums import KeptRows, Sums
from restuning.problems import Problem, SingleLabel

PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Penalties on the squared weights that are tried; the squared length of an input is about 1."""
TEMPERS = tuple(2.0 ** (k / 2) for k in range(-14, 5))
"""Factors that are tried on what a discriminant says, which are logits already: from 1/128 to 4."""
CHOSEN_ON = 4096
"""Rows at most on which penalty and discriminant are chosen: each step is a product of three matrices of that size."""
WEIGHED_ROWS, WEIGHT_STEPS, WEIGHT_RATE, TOGETHER, INTERCEPT = 1024, 20, 0.3, 500.0, 10.0
"""Of the weights of blocks, see `learn_weights`. How strongly they are drawn together was chosen where random labels
teach nothing, with an eye on six of the shared tasks, by scripts that are not kept (`docs/mixing.md`)."""
SMALLEST = 1e-12
"""Of the largest, values of directions that count."""


@dataclass(frozen=True)
class Solution:
    """A classifier `u x + v D(x) + b` on `x = W z + m`, least squares on one-hot labels; and its answers to rows left out.

    Of other problems than one class of several x is fitted to their columns, there is no D, and b holds the problem's offset.
    Of what started from a head of class names `w s` is added, s the answers of that, the last block of z.

    Attributes:
        weight, bias: Of the whole, `C f` and `C`, in double.
        penalty: That was chosen.
        plain: u, the scale of the regression's own answers.
        discriminant: v, the scale of their discriminant; 0 where there is none.
        shrinkage: Of its covariance.
        shares: Weight of each block; they sum to 1.
        start: w, the weight of the answers it started from; 0 where there are none.
        count: Rows that it was solved for.
        kept: Those of them that are held.
        answers: What the regression would answer to each of these had it been left out, `k C`, in double.
        left_out: What the whole would.
        problem: What was solved for.
    """

    weight: Tensor
    bias: Tensor
    penalty: float
    plain: float
    discriminant: float
    shrinkage: float
    shares: Tensor
    start: float
    count: int
    kept: KeptRows
    answers: Tensor
    left_out: Tensor
    problem: Problem
    _leave_out: Callable[[Tensor, Tensor], Tensor] = field(repr=False, compare=False)

    def leave_out(self, rows: Tensor, labels: Tensor) -> Tensor:
        """What rows that are in the sums, kept or not, would be answered had each been left out; `b C`.

        Cost: `f^2` operations a row.
        """
        return self._leave_out(rows, labels)

    @property
    def targets(self) -> Tensor:
        """Of the kept rows, as the problem has them."""
        labels = self.kept.labels
        return labels if self.problem.one_hot else self.problem.from_columns(labels)

    @property
    def accuracy(self) -> float | None:
        """Share of right answers to kept rows that are left out; None where answers are no classes."""
        if not self.problem.one_hot:
            return None
        right = self.left_out.argmax(1) == self.kept.labels
        return float(right.double().mean())


def solve(
    sums: Sums,
    kinds: Sequence[int],
    *,
    weighted: bool,
    problem: Problem | None = None,
    started: bool = False,
) -> Solution:
    r"""Solve for all rows; what is to be chosen has the lowest loss (cross-entropy) of kept rows left out.

    With `U S U^T` the products of centred rows with each other, answers are `m + U (S / (S + a)) U^T (y - m)`,
    a row's own share in its answer is `h = 1/n + sum_k U_k^2 S_k / (S_k + a)`, and left out it is
    `y - (y - answer) / (1 - h)` (Allen 1974). Where not all rows are held, `h = 1/n + z^T (G + a)^-1 z`, G the
    products of features: the same numbers. Where rows are weighed (`Sums.weights`), w_i is how much row i counts: means and
    products are so weighed, and `h = w / sum w + w z^T (G + a)^-1 z`; all losses that choose are weighed likewise.

    The answers are read twice: as they are, times a scale, and by a linear discriminant of the answers left out
    (`discriminant`), which is chosen on shares of rows that it has not seen; `find_weights` adds the two. Both are
    linear, so the whole is one linear classifier. Penalty, shrinkage and scales have the lowest cross-entropy.

    Args:
        sums: Of all rows.
        kinds: Sizes of the blocks of features.
        weighted: Learn a weight for each block (`learn_weights`), on the rows with the lowest keys.
        problem: Whose columns the labels are, whose loss chooses, and which turns fits into logits; None for
            one class of several. Only of that there is a discriminant.
        started: The last block is what a head answers that has seen no row, C logits: they are a part of z, and are
            added to what is read of x with a weight that `find_weights` decides.

    Raises:
        TunerShapeError: Fewer than two rows, or none that is kept to choose on.

    Cost: of n rows that are held `min(n, f)^3` operations and `k^2 n` for each of eight penalties, k at most
        `CHOSEN_ON` of them, seconds for 1000; beyond, `f^3 / 3` and `k f^2` for each, and three matrices `f f` in
        double. For each penalty `C^3` and `k C^2` of each share.
    """
    if sums.count < 2:
        raise TunerShapeError(
            "a closed-form classifier cannot be solved",
            found=f"{sums.count} rows",
            fix="give two rows or more",
        )
    problem = SingleLabel() if problem is None else problem
    kept, centre, count = sums.kept_rows(), sums.mean, sums.count
    if not len(kept.rows):
        raise _cannot_choose(f"{count} rows, and of those that are kept all were taken out")
    total, weights = sums.total, sums.weights
    middle = sums.totals / total
    if sums.products is None:
        # In double: directions down to 1e-12 of the largest are kept, below what fp32 resolves. One copy
        # that is written in place: it is the largest thing here.
        z = kept.rows.to(torch.double, copy=True)
        deviation = (
            z.std(0) if weights is None else _find_deviation(z, centre, weights[kept.labels])
        )
    else:
        z = None
        variance = sums.products.diagonal().clamp(min=0) / _one_less(total, count)
        deviation = variance.sqrt()
    # So that each kind has the same squared length, however many numbers it is made of.
    parts = torch.cat([centre.new_full((k,), float(k)) for k in kinds])
    # A number that never changes says nothing; dividing by its deviation would say noise.
    scale = torch.where(deviation > 1e-6, 1 / (deviation * parts.sqrt()), 0.0)
    shares = centre.new_full((len(kinds),), 1 / len(kinds))
    if weighted and len(kinds) > 1:
        few = KeptRows(*(t[:WEIGHED_ROWS] for t in kept))
        weighed = (few.rows.double() - centre).mul_(scale)
        shares = learn_weights(weighed, kinds, few.labels, sums.classes, problem, weights)
    share = torch.cat([shares[n].expand(k) for n, k in enumerate(kinds)]).sqrt()
    scale = scale * share
    if z is not None:
        truth = _columns(kept.labels, sums.classes)
        z.sub_(centre).mul_(scale)
        system: _Rows | _Products = _Rows(z, truth, middle, sums.weigh(kept.labels))
    else:
        system = _Products(sums, scale)
    first = KeptRows(*(t[:CHOSEN_ON] for t in kept))
    read = (_read(system, p, first, middle, total, problem, weights) for p in PENALTIES)
    best = min(read, key=lambda r: r.loss)
    if math.isinf(best.loss):
        raise _cannot_choose("rows that are not finite")
    said, start = slice(sum(kinds) - sums.classes, None), 0.0
    if started:
        best, start = _add_start(best, first, said, problem, weights)
    weight = best.weight @ system.weights(best.penalty).T * scale

    def answer_left_out(rows: Tensor, labels: Tensor) -> Tensor:
        z = (rows.to(sums.device, torch.double) - centre).mul_(scale)
        y = _columns(labels.to(sums.device), sums.classes)
        fitted, own = system.answer(z, best.penalty)
        left = 1 - 1 / total - own
        if weights is not None:
            left = 1 - (1 / total + own) * weights[labels.to(sums.device)]
        return y - (y - (middle + fitted)) / left[:, None]

    def leave_out(rows: Tensor, labels: Tensor) -> Tensor:
        return read_answers(answer_left_out(rows, labels), rows)

    def read_answers(answers: Tensor, rows: Tensor) -> Tensor:
        logits = answers @ best.weight.T + best.bias
        return logits + start * rows[:, said].to(logits) if started else logits

    # What is kept beyond those was seen by no discriminant either.
    others = zip(
        kept.rows[CHOSEN_ON:].split(AT_A_TIME),
        kept.labels[CHOSEN_ON:].split(AT_A_TIME),
        strict=True,
    )
    answers = torch.cat([best.answers, *(answer_left_out(*part) for part in others)])
    left_out = torch.cat([best.left_out, read_answers(answers[CHOSEN_ON:], kept.rows[CHOSEN_ON:])])
    bias = best.weight @ middle + best.bias - weight @ centre
    if started:
        weight[:, said].diagonal().add_(start)
    return Solution(
        weight,
        bias,
        best.penalty,
        best.plain,
        best.discriminant,
        best.shrinkage,
        shares,
        start,
        count,
        kept,
        answers,
        left_out,
        problem,
        leave_out,
    )


class _Reading(NamedTuple):
    """How answers with one penalty are best read: `weight answer + bias` are the logits."""

    penalty: float
    loss: float
    answers: Tensor
    left_out: Tensor
    weight: Tensor
    bias: Tensor
    plain: float
    discriminant: float = 0.0
    shrinkage: float = 0.0


def _read(
    system: _Rows | _Products,
    penalty: float,
    rows: KeptRows,
    middle: Tensor,
    total: float,
    problem: Problem,
    weights: Tensor | None = None,
) -> _Reading:
    """Answers of one penalty to rows left out, and the scale and the discriminant that read them best."""
    truth = _columns(rows.labels, len(middle))
    fitted, own = system.answer_first(len(truth), penalty)
    if weights is None:
        own = own.add_(1 / total)
    else:
        root = weights[rows.labels].sqrt()
        own = own.addr_(root, root, alpha=1 / total)
    residuals = truth - (middle + fitted)
    # Allen's identity: no second solution for the row that is left out.
    answers = truth - residuals / (1 - own.diagonal())[:, None]
    same = torch.eye(len(middle), dtype=answers.dtype, device=answers.device)
    if not problem.one_hot:
        return _read_columns(penalty, answers, rows, same, middle, int(total), problem)
    loss, plain = _scale(answers, rows.labels, problem.scales, weights)
    reading = _Reading(
        penalty, loss, answers, plain * answers, plain * same, torch.zeros_like(middle), plain
    )
    if math.isinf(loss) or len(truth) < A_CLASS * int((truth.sum(0) > 0).sum()):
        return reading
    shares = deal_shares(rows.labels, rows.keys)
    read = answer_by_shares(truth, residuals, own, shares, weights)
    scaled = [_scale(each, rows.labels, TEMPERS, weights) for each in read]
    number = min(range(len(read)), key=lambda n: scaled[n][0])
    temper = scaled[number][1]
    both = torch.stack([reading.left_out, temper * read[number]])
    u, v = find_weights(both, rows.labels, class_weights=weights).double().tolist()
    left_out = u * both[0] + v * both[1]
    weight, bias = list(fit_discriminants(answers, rows.labels, weights))[number]
    return _Reading(
        penalty,
        float(F.cross_entropy(left_out, rows.labels, weights)),
        answers,
        left_out,
        u * plain * same + v * temper * weight,
        v * temper * bias,
        u * plain,
        v * temper,
        SHRINKAGES[number],
    )


def _read_columns(
    penalty: float,
    answers: Tensor,
    rows: KeptRows,
    same: Tensor,
    middle: Tensor,
    count: int,
    problem: Problem,
) -> _Reading:
    """Answers of another problem than one class of several, with the scale of the lowest loss and its offset."""
    targets, readings = problem.from_columns(rows.labels), []
    for scale in problem.scales:
        offset = problem.offset(middle, count, scale)
        logits = scale * answers + offset
        loss = float(problem.mean_loss(logits, targets))
        # What is no number is not lower than anything.
        loss = loss if math.isfinite(loss) else math.inf
        readings.append(_Reading(penalty, loss, answers, logits, scale * same, offset, scale))
    return min(readings, key=lambda reading: reading.loss)


def _add_start(
    best: _Reading,
    rows: KeptRows,
    columns: slice,
    problem: Problem,
    weights: Tensor | None = None,
) -> tuple[_Reading, float]:
    """What is read, and beside it what a head says that has seen no row: each with its weight, and that of the head."""
    said = rows.rows[:, columns].to(best.left_out)
    targets = rows.labels if problem.one_hot else problem.from_columns(rows.labels)
    both = torch.stack([best.left_out, said])
    u, w = find_weights(both, targets, problem, weights).double().tolist()
    found = best._replace(
        left_out=u * best.left_out + w * said,
        weight=u * best.weight,
        bias=u * best.bias,
        plain=u * best.plain,
        discriminant=u * best.discriminant,
    )
    return found, w


def _scale(
    answers: Tensor, labels: Tensor, scales: Sequence[float], weights: Tensor | None = None
) -> tuple[float, float]:
    """The lowest cross-entropy of answers times a scale, and the scale; infinite where they are not finite."""
    best = math.inf, scales[0]
    for scale in scales:
        loss = float(F.cross_entropy(scale * answers, labels, weights))
        if loss < best[0]:
            best = loss, scale
    return best


def _columns(labels: Tensor, classes: int) -> Tensor:
    """What is fitted to, `n C` in double: columns as they are, or one-hot labels."""
    return labels.double() if labels.ndim == 2 else F.one_hot(labels, classes).double()


def _find_deviation(z: Tensor, centre: Tensor, weights: Tensor) -> Tensor:
    """Of each number of rows that count so much, `f`; a row at a time more would be a copy of all."""
    squares = torch.zeros_like(centre)
    for part, own in zip(z.split(AT_A_TIME), weights.split(AT_A_TIME), strict=True):
        squares += own @ (part - centre).square()
    return (squares / _one_less(float(weights.sum()), len(z))).sqrt()


def _one_less(total: float, count: int) -> float:
    """What a sum of squares about a mean is divided by: weights whose mean is not 1 say nothing of how many rows there are."""
    return total * (count - 1) / count


def _cannot_choose(found: str) -> TunerShapeError:
    return TunerShapeError(
        "penalty and scale of a closed-form classifier cannot be chosen",
        found=found,
        fix="train on all data anew",
    )


class _Rows:
    """All rows at hand: one decomposition serves every penalty.

    Args:
        z: `n f`, centred and scaled.
        truth: What is fitted to, `n C`.
        middle: Its mean, `C`.
        weights: How much each counts, `n`; None for all alike. Then z is multiplied by their roots, in place.
    """

    def __init__(
        self, z: Tensor, truth: Tensor, middle: Tensor, weights: Tensor | None = None
    ) -> None:
        self.root = None if weights is None else weights.sqrt()[:, None]
        self.z = z if self.root is None else z.mul_(self.root)
        self.values, self.vectors = _decompose(self.z)
        apart = truth - middle
        self.projected = self.vectors.T @ (apart if self.root is None else apart * self.root)

    def answer_first(self, number: int, penalty: float) -> tuple[Tensor, Tensor]:
        """Answers to the first k rows, less the shares of classes, and how much each counts in each, `k C` and `k k`.

        Of rows that are weighed the second is of rows times the roots of their weights, as is symmetric.
        """
        shrink, first = self.values / (self.values + penalty), self.vectors[:number]
        fitted = first @ (shrink[:, None] * self.projected)
        fitted = fitted if self.root is None else fitted / self.root[:number]
        return fitted, (first * shrink) @ first.T

    def answer(self, z: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
        """Answers to some of the rows, `b f`, met again, and their own shares in them, as if each counted 1, `b C` and `b`."""
        # `z = sum_k V_k (z . V_k)`, where `Z V_k = sqrt(S_k) U_k`.
        directions = self.z @ z.T
        turned = (self.vectors.T @ directions).square_()
        large = self.values > self.values[-1] * SMALLEST
        shares = turned[large] / (self.values * (self.values + penalty))[large][:, None]
        return z @ self.weights(penalty), shares.sum(0)

    def weights(self, penalty: float) -> Tensor:
        """`f C`."""
        return self.z.T @ (self.vectors @ (self.projected / (self.values + penalty)[:, None]))


class _Products:
    """Products of features: a factor a penalty.

    Args:
        sums: With products.
        scale: Of each feature, `f`.
    """

    def __init__(self, sums: Sums, scale: Tensor) -> None:
        self.sums, self.scale, self.centre = sums, scale, sums.mean
        # Rows times one-hot labels or columns, both centred, `f C`.
        apart = sums.with_targets - sums.totals[:, None] * self.centre
        self.with_truth = apart.mul_(scale).T.contiguous()
        self._factor: tuple[float, Tensor] | None = None

    def answer_first(self, number: int, penalty: float) -> tuple[Tensor, Tensor]:
        """As of `_Rows`, of the first k kept rows."""
        kept = self.sums.kept_rows()
        z = (kept.rows[:number].double() - self.centre).mul_(self.scale)
        turned = torch.linalg.solve_triangular(self._factor_of(penalty), z.T, upper=False)
        if (weights := self.sums.weigh(kept.labels[:number])) is not None:
            turned = turned * weights.sqrt()
        return z @ self.weights(penalty), turned.T @ turned

    def answer(self, z: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
        """As of `_Rows`, of any of the rows, `b f`, centred and scaled."""
        turned = torch.linalg.solve_triangular(self._factor_of(penalty), z.T, upper=False)
        return z @ self.weights(penalty), turned.square_().sum(0)

    def weights(self, penalty: float) -> Tensor:
        """`f C`."""
        return torch.cholesky_solve(self.with_truth, self._factor_of(penalty))

    def _factor_of(self, penalty: float) -> Tensor:
        """Lower triangular L with `L L^T = G + a`, `f f`."""
        if self._factor is None or self._factor[0] != penalty:
            # The one before is given back first: each is as large as the sums.
            self._factor = None
            assert self.sums.products is not None
            g = self.sums.products * self.scale
            g.mul_(self.scale[:, None]).diagonal().add_(penalty)
            self._factor = penalty, torch.linalg.cholesky(g)
        return self._factor[1]


def learn_weights(
    z: Tensor,
    kinds: Sequence[int],
    labels: Tensor,
    classes: int,
    problem: Problem | None = None,
    class_weights: Tensor | None = None,
) -> Tensor:
    r"""A weight for each block of inputs, from the cross-entropy of rows left out; they sum to 1.

    With `K = sum_k w_k Z_k Z_k^T` and `M = (K + c + 1)^-1` (c lets the intercept go unpenalised), the
    answer to a row left out is `y_i - (M y)_i / M_ii`. Its cross-entropy, with answers times a scale, plus
    `500 / (n log C)` times the variance of `log w`, is minimised over `log w` and the scale by 20 steps of Adam.
    Drawn together so, weights learn next to nothing from random labels (`tests/laws/test_ridge.py`); free
    ones do, and would make answers to rows left out look better than they are.

    Args:
        z: `n f`, centred, each block of squared length about 1.
        kinds: Sizes of the blocks.
        labels: `n`, or columns `n C`.
        classes: C.
        problem: Whose loss stands in the place of cross-entropy, and what it loses to an answer that knows nothing
            in that of `log C`; None for one class of several.
        class_weights: How much a row of each class counts, `C`; None for all alike. `1 / w_i` then stands in the place of
            the 1 in M.

    Cost: 20 times about `3 n^3` operations in fp32 and `blocks n^2` numbers of memory; `solve` gives at most 1024 rows.
    """
    rows = len(z)
    problem = SingleLabel() if problem is None else problem
    # Of few rows and few classes there is little to learn from: a label tells log C.
    together = TOGETHER / (rows * problem.surprise(classes))
    blocks = torch.stack([(b @ b.mT).flatten() for b in z.float().split(list(kinds), 1)])
    truth = _columns(labels, classes).to(blocks.dtype)
    row_weights = None if class_weights is None else class_weights[labels].to(blocks.dtype)
    # Together they weigh 1 / 0.3: a penalty of 0.3 where each has a squared length of 1.
    logs = blocks.new_full((len(kinds),), -math.log(0.3 * len(kinds)))
    scale = blocks.new_full((1,), math.log(23.0) if len(problem.scales) > 1 else 0.0)
    steps = torch.optim.Adam([logs, scale], lr=WEIGHT_RATE, betas=(0.9, 0.95))
    for step in range(WEIGHT_STEPS):
        logs.grad, scale.grad = find_gradient(blocks, logs, scale, truth, problem, row_weights)
        logs.grad += 2 * together * (logs - logs.mean()) / len(kinds)
        for group in steps.param_groups:
            group["lr"] = WEIGHT_RATE * (1 + math.cos(math.pi * step / WEIGHT_STEPS)) / 2
        steps.step()
    return logs.double().softmax(0)


def find_gradient(
    blocks: Tensor,
    logs: Tensor,
    scale: Tensor,
    truth: Tensor,
    problem: Problem | None = None,
    row_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Of the mean loss (cross-entropy) of rows left out, by `log w` and by the log of the scale.

    By hand: preparation runs without a graph, and this needs one product of two `n n` where autograd
    through an inverse needs several.

    Args:
        blocks: `B n*n`, products of rows, one a block.
        logs: `B`.
        scale: `1`.
        truth: `n C`, one-hot or columns.
        problem: Whose loss it is; None for one class of several.
        row_weights: How much each row counts, `n`; None for all alike.
    """
    problem = SingleLabel() if problem is None else problem
    weights, rows = logs.exp(), len(truth)
    kernel = (weights @ blocks).view(rows, rows) + INTERCEPT
    kernel.diagonal().add_(1.0 if row_weights is None else 1 / row_weights)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(kernel))
    solved, own = inverse @ (truth - truth.mean(0)), inverse.diagonal()
    left_out = truth - solved / own[:, None]
    tau = scale.exp()
    middle = truth.mean(0)
    offset = problem.offset(middle, rows, float(tau))
    by_answer = tau * problem.gradient(tau * left_out + offset, truth) / rows
    if row_weights is not None:
        by_answer = by_answer * row_weights[:, None] * (rows / row_weights.sum())
    # From answers left out to the kernel, and from there to its weights.
    by_own = (by_answer * solved).sum(1) / own.square()
    by_kernel = (inverse @ (by_answer / own[:, None])) @ solved.mT - (inverse * by_own) @ inverse
    by_scale = (by_answer * left_out).sum()
    if not problem.one_hot:
        # What is added to logits moves with the scale, too; where that is fixed nothing does.
        moves = offset - problem.offset(middle, rows, 0.0)
        by_scale = by_scale + (by_answer / tau * moves).sum()
        by_scale = by_scale * (len(problem.scales) > 1)
    return weights * (blocks @ by_kernel.flatten()), by_scale.view(1)


def _decompose(z: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (`r`) and eigenvectors (`n r`) of `z z^T`, from the smaller of the two products."""
    if len(z) <= z.shape[1]:
        values, vectors = torch.linalg.eigh(z @ z.T)
        return values.clamp(min=0), vectors
    # If v is an eigenvector of z^T z with value s, z v / sqrt(s) is one of z z^T with the same.
    values, turned = torch.linalg.eigh(z.T @ z)
    nonzero = values > values[-1] * SMALLEST
    return values[nonzero], z @ (turned[:, nonzero] / values[nonzero].sqrt())
