"""Heads: a linear map of the feature, drawn afresh or given."""

from __future__ import annotations

from copy import deepcopy

from torch import nn

from restuning._errors import TunerShapeError

STD = 0.02
"""Of a new head's weights, as timm draws those of its ViTs."""


def head_of(dim: int, classes: int | None, given: nn.Linear | None) -> nn.Linear | None:
    """The head of a task: a copy of the one that is given, else a new one, else None.

    Args:
        dim: Width of the feature.
        classes: Number of classes; None for no head, or for as many as the given one has.
        given: A head that is there already.

    Raises:
        TunerShapeError: The head that is given reads another width, or has other classes.
    """
    if given is not None:
        if given.in_features != dim or classes not in (None, given.out_features):
            raise TunerShapeError(
                "the head does not fit",
                found=f"{given.in_features} to {given.out_features}; the feature is {dim} wide "
                f"and {classes or 'any number of'} classes are wanted",
                fix="give a head that was made for this backbone's feature and these classes",
            )
        return deepcopy(given).requires_grad_(True)
    if not classes:
        return None
    head = nn.Linear(dim, classes)
    nn.init.trunc_normal_(head.weight, std=STD)
    nn.init.zeros_(head.bias)
    return head
