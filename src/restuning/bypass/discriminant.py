"""A linear discriminant of what a classifier answers to rows left out.

Least squares on one-hot labels hides a class that lies between others ("masking"): where labels say how many or
where, the middle ones are never the largest answer, though the answers together tell them well. A discriminant reads
them together.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

SHRINKAGES = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""What is added to the covariance of answers, in means of their variances; with the largest it hardly counts."""
SHARES = 5
"""Shares of rows, each of which is answered by a discriminant of the others."""
A_CLASS = 3
"""Rows of a class, on average, below which there is no discriminant: they say too little of how answers vary."""


def fit_discriminants(
    answers: Tensor, labels: Tensor, weights: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    r"""Weight and bias of `x -> m_c^T S^-1 x - m_c^T S^-1 m_c / 2 + log p_c` for each of `SHRINKAGES`.

    m_c is the mean of the answers to a class, S their covariance within classes plus the shrinkage, p_c the share of
    the class with half a row beside it; a class without rows has the mean of all.

    Args:
        answers: `n C`.
        labels: `n`.
        weights: How much a row of each class counts, `C`; None for all alike. Shares of classes and the covariance are then
            those of rows as much as they count.

    Returns:
        `C C` and `C`, one after the other.

    Cost: `n C^2`, once one eigenproblem of `C C`.
    Reference: Fisher 1936; on the answers of a regression it is flexible discriminant analysis (Hastie, Tibshirani
    and Buja 1994).
    """
    classes = answers.shape[1]
    counts = torch.bincount(labels, minlength=classes).to(answers.dtype)
    means = torch.zeros_like(answers[:1].expand(classes, -1)).index_add(0, labels, answers)
    means = torch.where(
        counts[:, None] > 0, means / counts.clamp(min=1)[:, None], answers.mean(0, keepdim=True)
    )
    within = answers - means[labels]
    if weights is None:
        values, vectors = torch.linalg.eigh(within.T @ within / len(answers))
    else:
        each, counts = weights[labels], counts * weights
        values, vectors = torch.linalg.eigh(within.T @ (within * each[:, None]) / each.sum())
    # Never zero: answers that do not vary at all are divided by it.
    size = values.mean().clamp(min=1e-12)
    prior = ((counts + 0.5) / (counts + 0.5).sum()).log()
    turned = means @ vectors
    for shrinkage in SHRINKAGES:
        weight = (turned / (values.clamp(min=0) + shrinkage * size)) @ vectors.T
        yield weight, prior - (weight * means).sum(1) / 2


def deal_shares(labels: Tensor, keys: Tensor) -> Tensor:
    """The share of each row, 0 to 4, `n`: rows of a class in turn, so that each share has as many of it.

    Decided by keys alone, whatever number a class has; rows of one key are of one share, or a row would be left out and
    its twin seen. Classes begin with different shares, or the first would be
    the largest. Of rows dealt without a look at classes each would be answered its own a little less than the
    others, as it is missing there: labels that mean nothing could be read off that.

    Args:
        labels: `n`.
        keys: `n`, in rising order, and labels in rising order where keys are the same.
    """
    ones, new = F.one_hot(labels), torch.ones_like(labels)
    new[1:] = (keys[1:] != keys[:-1]) | (labels[1:] != labels[:-1])
    turn = ((ones * new[:, None]).cumsum(0) * ones).sum(1) - 1
    first = (turn == 0) & new.bool()
    begin = torch.zeros_like(ones[0]).index_add(0, labels[first], keys[first] % SHARES)
    return (turn + begin[labels]) % SHARES


def answer_by_shares(
    truth: Tensor,
    residuals: Tensor,
    own: Tensor,
    shares: Tensor,
    weights: Tensor | None = None,
) -> list[Tensor]:
    r"""What discriminants say of rows of a share that neither they nor the answers they read and are made of have seen.

    For each share F the regression is taken back as if F had not been there, with no second solution: F is answered
    `y_F - (I - H_FF)^-1 e_F`, the other rows J have the residuals `e_J + H_JF (I - H_FF)^-1 e_F`, and their own shares
    are `h_J + diag(H_JF (I - H_FF)^-1 H_FJ)`. Of their answers left out the discriminants are made, and these read the
    answers to F. Of rows left out one at a time they would know too much: on many classes they would have seen F
    through the answers to J, and on labels that mean nothing each row's class is answered a little less than
    the others, because the row is missing there.

    Args:
        truth: One-hot labels, `n C`.
        residuals: `truth` less the fitted answers, `n C`.
        own: H, how much each row counts in each fitted answer, the intercept included, `n n`.
        shares: Of each row, `n`.
        weights: How much a row of each class counts, `C`; None for all alike. `own` is then of rows times the root of
            that, as is symmetric.

    Returns:
        `n C` for each of `SHRINKAGES`.
    """
    labels = truth.argmax(1)
    root = None if weights is None else weights[labels].sqrt()[:, None]
    residuals = residuals if root is None else residuals * root
    found = [torch.zeros_like(truth) for _ in SHRINKAGES]
    for share in range(SHARES):
        out = shares == share
        if not bool(out.any()) or bool(out.all()):
            continue
        across = own[out][:, ~out]
        rest = torch.eye(len(across), dtype=own.dtype, device=own.device) - own[out][:, out]
        solved = torch.linalg.solve(rest, torch.cat([across, residuals[out]], 1))
        by_others, missing = solved.split([across.shape[1], truth.shape[1]], 1)
        error = residuals[~out] + across.T @ missing
        taken = own.diagonal()[~out] + (across * by_others).sum(0)
        error = error / (1 - taken)[:, None]
        if root is not None:
            error, missing = error / root[~out], missing / root[out]
        answers, asked = truth[~out] - error, truth[out] - missing
        made = fit_discriminants(answers, labels[~out], weights)
        for each, (weight, bias) in zip(found, made, strict=True):
            each[out] = asked @ weight.T + bias
    return found
