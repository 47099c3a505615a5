"""The solution of a linear classifier from sums, and what it would answer to each row left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from restuning._errors import TunerShapeError
from restuning.bypass.sums import TOGETHER as AT_A_TIME
from restuning.bypass.sums import KeptRows, Sums

PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Penalties on the squared weights that are tried; the squared length of an input is about 1."""
SCALES = tuple(2.0 ** (k / 2) for k in range(15))
"""Factors that are tried to turn answers between 0 and 1 into logits: from 1 to 128."""
WEIGHED_ROWS, WEIGHT_STEPS, WEIGHT_RATE, TOGETHER, INTERCEPT = 1024, 20, 0.3, 500.0, 10.0
"""Of the weights of blocks, see `learn_weights`. How strongly they are drawn together was chosen where random labels
teach nothing, with an eye on six of the shared tasks, by scripts that are not kept (`docs/mixing.md`)."""
SMALLEST = 1e-12
"""Of the largest, values of directions that count."""


@dataclass(frozen=True)
class Solution:
    """A classifier `tau (W x + b)`, and its answers to rows left out.

    Attributes:
        weight, bias: With tau in them, `C f` and `C`, in double.
        tau, penalty: That were chosen.
        shares: Weight of each block; they sum to 1.
        count: Rows that it was solved for.
        kept: Those of them that tau and penalty were chosen on.
        left_out: What each of these would be answered had it been left out, `k C`, in double.
    """

    weight: Tensor
    bias: Tensor
    tau: float
    penalty: float
    shares: Tensor
    count: int
    kept: KeptRows
    left_out: Tensor
    _leave_out: Callable[[Tensor, Tensor], Tensor] = field(repr=False, compare=False)

    def leave_out(self, rows: Tensor, labels: Tensor) -> Tensor:
        """What rows that are in the sums, kept or not, would be answered had each been left out; `b C`.

        Cost: `f^2` operations a row.
        """
        return self._leave_out(rows, labels)

    @property
    def accuracy(self) -> float:
        """Share of right answers to kept rows that are left out."""
        right = self.left_out.argmax(1) == self.kept.labels
        return float(right.double().mean())


def solve(sums: Sums, kinds: Sequence[int], *, weighted: bool) -> Solution:
    r"""Solve for all rows, with the penalty and the scale of the lowest cross-entropy of kept rows left out.

    With `U S U^T` the products of centred rows with each other, answers are `m + U (S / (S + a)) U^T (y - m)`,
    a row's own share in its answer is `h = 1/n + sum_k U_k^2 S_k / (S_k + a)`, and left out it is
    `y - (y - answer) / (1 - h)` (Allen 1974). Where not all rows are held, `h = 1/n + z^T (G + a)^-1 z`, G the
    products of features: the same numbers.

    Args:
        sums: Of all rows.
        kinds: Sizes of the blocks of features.
        weighted: Learn a weight for each block (`learn_weights`), on the rows with the lowest keys.

    Raises:
        TunerShapeError: Fewer than two rows, or none that is kept to choose on.

    Cost: of n rows that are held `min(n, f)^3` operations, a second for 1000; beyond, `f^3 / 3` and `k f^2` for each
        of eight penalties, k the rows that are kept, and three matrices `f f` in double.
    """
    if sums.count < 2:
        raise TunerShapeError(
            "a closed-form classifier cannot be solved",
            found=f"{sums.count} rows",
            fix="give two rows or more",
        )
    kept, centre, count = sums.kept_rows(), sums.mean, sums.count
    if not len(kept.rows):
        raise _cannot_choose(f"{count} rows, and of those that are kept all were taken out")
    counts = sums.counts.to(sums.device, torch.double)
    middle = counts / count
    if sums.products is None:
        # In double: directions down to 1e-12 of the largest are kept, below what fp32 resolves. One copy
        # that is written in place: it is the largest thing here.
        z = kept.rows.to(torch.double, copy=True)
        deviation = z.std(0)
    else:
        z = None
        deviation = (sums.products.diagonal().clamp(min=0) / (count - 1)).sqrt()
    # So that each kind has the same squared length, however many numbers it is made of.
    parts = torch.cat([centre.new_full((k,), float(k)) for k in kinds])
    # A number that never changes says nothing; dividing by its deviation would say noise.
    scale = torch.where(deviation > 1e-6, 1 / (deviation * parts.sqrt()), 0.0)
    shares = centre.new_full((len(kinds),), 1 / len(kinds))
    if weighted and len(kinds) > 1:
        few = KeptRows(*(t[:WEIGHED_ROWS] for t in kept))
        weighed = (few.rows.double() - centre).mul_(scale)
        shares = learn_weights(weighed, kinds, few.labels, sums.classes)
    share = torch.cat([shares[n].expand(k) for n, k in enumerate(kinds)]).sqrt()
    scale = scale * share
    if z is not None:
        problem: _Rows | _Products = _Rows(z.sub_(centre).mul_(scale), kept.labels, middle)
    else:
        problem = _Products(sums, scale, counts)
    truth = F.one_hot(kept.labels, sums.classes).double()
    best, chosen = math.inf, (PENALTIES[0], SCALES[0], truth)
    for penalty in PENALTIES:
        fitted, own = problem.answer_kept(penalty)
        # Allen's identity: no second solution for the row that is left out.
        left_out = truth - (truth - (middle + fitted)) / (1 - 1 / count - own)[:, None]
        for tau in SCALES:
            loss = float(F.cross_entropy(tau * left_out, kept.labels))
            if loss < best:
                best, chosen = loss, (penalty, tau, left_out)
    if math.isinf(best):
        raise _cannot_choose("rows that are not finite")
    penalty, tau, left_out = chosen
    weight = tau * problem.weights(penalty).T * scale

    def leave_out(rows: Tensor, labels: Tensor) -> Tensor:
        z = (rows.to(sums.device, torch.double) - centre).mul_(scale)
        y = F.one_hot(labels.to(sums.device), sums.classes).double()
        fitted, own = problem.answer(z, penalty)
        return tau * (y - (y - (middle + fitted)) / (1 - 1 / count - own)[:, None])

    return Solution(
        weight,
        tau * middle - weight @ centre,
        tau,
        penalty,
        shares,
        count,
        kept,
        tau * left_out,
        leave_out,
    )


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
        labels: `n`.
        middle: Share of each class, `C`.
    """

    def __init__(self, z: Tensor, labels: Tensor, middle: Tensor) -> None:
        self.z = z
        self.values, self.vectors = _decompose(z)
        self.projected = self.vectors.T @ (F.one_hot(labels, len(middle)).double() - middle)

    def answer_kept(self, penalty: float) -> tuple[Tensor, Tensor]:
        """Answers to the rows, less the shares of classes, and their own shares in them, `n C` and `n`."""
        shrink = self.values / (self.values + penalty)
        return self.vectors @ (shrink[:, None] * self.projected), self.vectors.square() @ shrink

    def answer(self, z: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
        """The same of some of the rows, `b f`, met again."""
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
        counts: Rows of each class, `C`.
    """

    def __init__(self, sums: Sums, scale: Tensor, counts: Tensor) -> None:
        self.sums, self.scale, self.centre = sums, scale, sums.mean
        # Rows times one-hot labels, both centred, `f C`.
        self.with_truth = (sums.sums - counts[:, None] * self.centre).mul_(scale).T.contiguous()
        self._factor: tuple[float, Tensor] | None = None

    def answer_kept(self, penalty: float) -> tuple[Tensor, Tensor]:
        """Answers to kept rows, less the shares of classes, and their own shares in them, `k C` and `k`."""
        parts = [
            self.answer((part.double() - self.centre).mul_(self.scale), penalty)
            for part in self.sums.kept_rows().rows.split(AT_A_TIME)
        ]
        answers, shares = zip(*parts, strict=True)
        return torch.cat(answers), torch.cat(shares)

    def answer(self, z: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
        """The same of any of the rows, `b f`, centred and scaled."""
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


def learn_weights(z: Tensor, kinds: Sequence[int], labels: Tensor, classes: int) -> Tensor:
    r"""A weight for each block of inputs, from the cross-entropy of rows left out; they sum to 1.

    With `K = sum_k w_k Z_k Z_k^T` and `M = (K + c + 1)^-1` (c lets the intercept go unpenalised), the
    answer to a row left out is `y_i - (M y)_i / M_ii`. Its cross-entropy, with answers times a scale, plus
    `500 / (n log C)` times the variance of `log w`, is minimised over `log w` and the scale by 20 steps of Adam.
    Drawn together so, weights learn next to nothing from random labels (`tests/laws/test_ridge.py`); free
    ones do, and would make answers to rows left out look better than they are.

    Args:
        z: `n f`, centred, each block of squared length about 1.
        kinds: Sizes of the blocks.
        labels: `n`.
        classes: C.

    Cost: 20 times about `3 n^3` operations in fp32 and `blocks n^2` numbers of memory; `solve` gives at most 1024 rows.
    """
    rows = len(z)
    # Of few rows and few classes there is little to learn from: a label tells log C.
    together = TOGETHER / (rows * math.log(max(2, classes)))
    blocks = torch.stack([(b @ b.mT).flatten() for b in z.float().split(list(kinds), 1)])
    truth = F.one_hot(labels, classes).to(blocks.dtype)
    # Together they weigh 1 / 0.3: a penalty of 0.3 where each has a squared length of 1.
    logs = blocks.new_full((len(kinds),), -math.log(0.3 * len(kinds)))
    scale = blocks.new_full((1,), math.log(23.0))
    steps = torch.optim.Adam([logs, scale], lr=WEIGHT_RATE, betas=(0.9, 0.95))
    for step in range(WEIGHT_STEPS):
        logs.grad, scale.grad = find_gradient(blocks, logs, scale, truth)
        logs.grad += 2 * together * (logs - logs.mean()) / len(kinds)
        for group in steps.param_groups:
            group["lr"] = WEIGHT_RATE * (1 + math.cos(math.pi * step / WEIGHT_STEPS)) / 2
        steps.step()
    return logs.double().softmax(0)


def find_gradient(
    blocks: Tensor, logs: Tensor, scale: Tensor, truth: Tensor
) -> tuple[Tensor, Tensor]:
    """Of the mean cross-entropy of rows left out, by `log w` and by the log of the scale.

    By hand: preparation runs without a graph, and this needs one product of two `n n` where autograd
    through an inverse needs several.

    Args:
        blocks: `B n*n`, products of rows, one a block.
        logs: `B`.
        scale: `1`.
        truth: `n C`, one-hot.
    """
    weights, rows = logs.exp(), len(truth)
    kernel = (weights @ blocks).view(rows, rows) + INTERCEPT
    kernel.diagonal().add_(1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(kernel))
    solved, own = inverse @ (truth - truth.mean(0)), inverse.diagonal()
    left_out = truth - solved / own[:, None]
    tau = scale.exp()
    by_answer = tau * ((tau * left_out).softmax(1) - truth) / rows
    # From answers left out to the kernel, and from there to its weights.
    by_own = (by_answer * solved).sum(1) / own.square()
    by_kernel = (inverse @ (by_answer / own[:, None])) @ solved.mT - (inverse * by_own) @ inverse
    return weights * (blocks @ by_kernel.flatten()), (by_answer * left_out).sum().view(1)


def _decompose(z: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (`r`) and eigenvectors (`n r`) of `z z^T`, from the smaller of the two products."""
    if len(z) <= z.shape[1]:
        values, vectors = torch.linalg.eigh(z @ z.T)
        return values.clamp(min=0), vectors
    # If v is an eigenvector of z^T z with value s, z v / sqrt(s) is one of z z^T with the same.
    values, turned = torch.linalg.eigh(z.T @ z)
    nonzero = values > values[-1] * SMALLEST
    return values[nonzero], z @ (turned[:, nonzero] / values[nonzero].sqrt())
