"""One task that answers as several do on average."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from restuning._errors import FormatError
from restuning.bypass import Ensemble
from restuning.task.task import Task


def reason_not_averaged(tasks: Sequence[Task]) -> str:
    """Why tasks have no average that is one task, in words; "" where they have one."""
    first = tasks[0]
    if len(tasks) < 2:
        return "there is one task"
    if any(task.inline_tuners or len(task.weights) for task in tasks):
        return "tuners inside the backbone need a forward each"
    if any(task.head is None for task in tasks):
        return "a task without a head gives no answers"
    sides = [task.side for task in tasks]
    if any((side is None) != (first.side is None) for side in sides):
        return "some have a side network and some have none"
    if any(side is not None and side.prepared_taps for side in sides):
        return "a side network that is prepared, or solved, is the same in each"
    if any(task.problem.without_errors() != first.problem.without_errors() for task in tasks):
        return "they answer otherwise"
    told = {(task.pool, tuple(task.labels or ()), _classes(task)) for task in tasks}
    return "" if len(told) == 1 else "they have other classes, or another readout"


def average(tasks: Sequence[Task]) -> Task:
    """A task whose logits are `1/k sum_k logits_k / T_k`, T the temperature of each.

    Of linear probes it is one linear probe. Of side networks it is an `Ensemble` of copies of them, which
    reads the taps once and is saved, put into banks and served as one task. Probabilities are of the mean of logits, which
    is sharper where they agree.

    Args:
        tasks: Trained, of one backbone, beside it only.

    Raises:
        FormatError: They have no average that is one task.

    Cost: of `forward` that of all of them, without the backbone's.
    """
    if reason := reason_not_averaged(tasks):
        raise FormatError(
            "these tasks cannot be averaged",
            found=reason,
            fix="give trained tasks that differ in their seed or their settings alone",
        )
    first, shares = tasks[0], [1 / (len(tasks) * task.temperature) for task in tasks]
    # The error bars of one of them are those of the mean, or a little more.
    more: dict[str, Any] = {
        "pool": first.pool,
        "method": first.method,
        "labels": first.labels,
        "problem": first.problem,
    }
    heads = [task.head for task in tasks if task.head is not None]
    if first.side is None:
        head = nn.Linear(heads[0].in_features, heads[0].out_features)
        with torch.no_grad():
            for name, value in head.named_parameters():
                parts = [s * h.get_parameter(name) for s, h in zip(shares, heads, strict=True)]
                value.copy_(torch.stack(parts).sum(0))
        return Task(head=head, **more)
    # Through their specs, as files are: what is averaged stays as it is.
    copies = [Task.from_spec(task.spec()) for task in tasks]
    for copy, task in zip(copies, tasks, strict=True):
        copy.load_state_dict(task.state_dict())
    ensemble = Ensemble(
        [copy.side for copy in copies if copy.side is not None],
        [head.in_features for head in heads],
        _classes(first),
    )
    for number, copy in enumerate(copies):
        assert copy.head is not None
        ensemble.heads[number] = copy.head
    ensemble.weight.copy_(torch.tensor(shares))
    head = ensemble.widen(nn.Linear(_classes(first), _classes(first)))
    return Task(side=ensemble, head=head, **more).eval()


def _classes(task: Task) -> int:
    return 0 if task.head is None else task.head.out_features
