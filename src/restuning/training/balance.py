"""Classes or labels that are rare: weights in the loss, sampling, and a warning where nobody asked for either."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from restuning._errors import TrainingError, warn
from restuning.bypass import SideNetwork
from restuning.data.targets import has_targets_at_hand, stack_targets
from restuning.problems import Problem, find_problem
from restuning.runtime.randomness import preserve_randomness
from restuning.training.prepare import is_solved
from restuning.training.settings import FitSettings

STRONG = 10
"""Times that the most frequent class is there as often as the rarest, from which on it is told."""


def read_targets(train: Any) -> Tensor:
    """The targets of a training split together (`stack_targets`); what is drawn after is what it would have been."""
    # A class of the user's own may draw where it is read.
    with preserve_randomness():
        return stack_targets(train)


def find_weights(task: nn.Module, train: Any, settings: FitSettings) -> Tensor | None:
    """What `class_weights` weighs the loss of a task by; None where it weighs all alike.

    Its side network is told, and refuses them where it is solved in closed form without them.

    Raises:
        TrainingError: Its problem knows no rare answers, or what is solved in closed form cannot be weighed.
    """
    weights = None
    if settings.class_weights is not None:
        problem = find_problem(task)
        targets = read_targets(train)
        problem.check_targets(targets)
        weights = problem.balance(targets, _count_outputs(task, problem, targets))
    side = getattr(task, "side", None)
    if isinstance(side, SideNetwork):
        side.weigh(weights)
    return weights


def find_groups(task: nn.Module, train: Any, settings: FitSettings) -> list[Tensor] | None:
    """The groups that `balanced_sampling` draws as many examples of; None where it draws each once.

    Raises:
        TrainingError: Its problem knows no rare answers, or it takes no steps that examples are drawn for.
    """
    if not settings.balanced_sampling:
        return None
    if finds_by_targets(task):
        raise TrainingError(
            "what is solved in closed form draws no examples",
            where="balanced_sampling",
            found=f"method {getattr(task, 'method', type(task).__name__)}",
            fix="leave out --balanced-sampling, or choose a method that is trained by steps alone",
        )
    problem = find_problem(task)
    targets = read_targets(train)
    problem.check_targets(targets)
    return problem.groups(targets, _count_outputs(task, problem, targets))


def finds_by_targets(task: nn.Module) -> bool:
    """Whether numbers of a task are found by targets beside steps, where no sampling reaches."""
    return is_solved(task) or getattr(getattr(task, "side", None), "solves", False)


def takes_weights(task: nn.Module) -> bool:
    """Whether all numbers of a task can be found with weights of classes."""
    side = getattr(task, "side", None)
    return side.weighs if isinstance(side, SideNetwork) else True


def warn_of_imbalance(
    problem: Problem,
    train: Any,
    labels: Sequence[str],
    settings: FitSettings,
    *,
    by_steps: bool = True,
    weighs: bool = True,
) -> None:
    """Warn where the most frequent class is there more than `STRONG` times as often as the rarest, and nothing is done.

    Args:
        problem, train, labels, settings: Of the run.
        by_steps: Whether the method draws examples for steps (`finds_by_targets` is false), so that it can be balanced.
        weighs: Whether it takes weights of classes (`takes_weights`). With neither it is said that another method has to.
    """
    if settings.class_weights is not None or settings.balanced_sampling:
        return
    if type(problem).counts is Problem.counts or not has_targets_at_hand(train):
        return
    counts = problem.counts(read_targets(train), problem.outputs(labels))
    there = [] if counts is None else [(n, k) for k, n in enumerate(counts.tolist()) if n]
    if not there:
        return
    (fewest, rare), (most, frequent) = min(there), max(there)
    if most <= STRONG * fewest:
        return
    sampled = type(problem).groups is not Problem.groups
    other = not by_steps and not weighs
    ways = ["--class-weights balanced"] * (weighs or other)
    ways += ["--balanced-sampling"] * (sampled and (by_steps or other))
    warn(
        f"some {problem.noun} are much rarer than others",
        found=f"{labels[rare]}: {fewest:,}, {labels[frequent]}: {most:,} training examples",
        fix=f"look at the balanced figures of the report; with {' or '.join(ways)} rare ones count as much"
        + (", of a method that is trained by steps (this one is solved)" if other else ""),
    )


def _count_outputs(task: nn.Module, problem: Problem, targets: Tensor) -> int:
    labels = getattr(task, "labels", None)
    head = getattr(task, "head", None)
    if labels:
        return problem.outputs(labels)
    if isinstance(head, nn.Linear):
        return head.out_features
    # A module of the user's own: what it answers is seen in its targets.
    return targets.shape[1] if targets.ndim == 2 and not problem.one_hot else int(targets.max()) + 1
