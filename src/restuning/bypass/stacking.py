"""How several answers to one row are added up: by weights that rows left out decide."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from restuning.problems import Problem, SingleLabel

WEIGHT_STEPS = 100
"""At most, of L-BFGS; a handful of weights takes ten to thirty."""


def find_weights(
    logits: Tensor,
    labels: Tensor,
    problem: Problem | None = None,
    class_weights: Tensor | None = None,
) -> Tensor:
    r"""The weights `w >= 0` of sums of logits with the lowest loss (cross-entropy), `m`.

    A weight is kept near `1 / m` by `(w - 1 / m)^2 / n`: of a few rows, which any large weight would fit,
    little is believed.

    Args:
        logits: `m n C` (or `m n ... C`), answers to rows that were left out.
        labels: `n`, or targets of another problem.
        problem: Whose loss it is; None for one class of several.
        class_weights: What answers count by what they should have been (`Problem.balance`); None for all alike.

    Reference: stacked generalisation, Wolpert 1992, with non-negative weights (Breiman 1996).
    """
    problem = SingleLabel() if problem is None else problem
    logits = logits.double()
    even = 1 / len(logits)
    # Of logarithms, so that no weight is negative.
    logs = logits.new_full((len(logits),), math.log(even)).requires_grad_()
    steps = torch.optim.LBFGS([logs], max_iter=WEIGHT_STEPS, line_search_fn="strong_wolfe")

    def find_loss() -> Tensor:
        with torch.enable_grad():
            steps.zero_grad()
            weights = logs.exp()
            total = torch.einsum("m,m...->...", weights, logits)
            if class_weights is None:
                loss = problem.mean_loss(total, labels)
            else:
                loss = problem.weighted_loss(total, labels, class_weights) / len(labels)
            loss = loss + (weights - even).square().sum() / len(labels)
            loss.backward()
        return loss

    steps.step(find_loss)
    return logs.detach().exp().float()
