"""A host and a task as one module: what is trained, compiled, exported and wrapped in DDP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from restuning._errors import TrainingError
from restuning.host import Extractor, Host, cannot_tune_inside
from restuning.sites import Features, Needs
from restuning.task.task import Task

INPUT = "*"
"""Name of a positional input in a batch that has to carry more by name: no argument is called so."""


class Tuned(nn.Module):
    """`Tuned(host, task)(x)` gives the task's logits; only the task's parameters train.

    An inline task runs its tuners inside the backbone's forward. A bypass task runs the backbone
    once without gradient, keeping only what it needs, and then its side network; so does a head
    alone. A task without a head and a pool gives the backbone's own output: its logits and loss,
    for a language model.

    Args:
        host: The frozen backbone; an engine for a bypass task or a head alone.
        task: Inline or bypass.

    Shape:
        Input as the backbone takes it; returns `b c`.

    Raises:
        EngineError: The task runs inside the backbone, and that is an engine.
        TrainingError: A tap arrived with a gradient graph (a bypass must not have one).
    """

    def __init__(self, host: Extractor, task: Task) -> None:
        super().__init__()
        if _runs_inside(task) and not isinstance(host, Host):
            raise cannot_tune_inside(task.method)
        self.host, self.task = host, task

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the logits of one batch."""
        if _runs_inside(self.task):
            return self._inside(*args, **kwargs)
        # They are taps that were made before training; the backbone must not see them as arguments.
        prepared = self.task.take_prepared(kwargs)
        taps = self.taps(*args, **kwargs)
        taps.update(prepared)
        return self.task(taps, self.host.readout)

    def taps(self, *args: Any, **kwargs: Any) -> Features:
        """What the task reads of the backbone, for one batch.

        Raises:
            TrainingError: A tap arrived with a gradient graph.
        """
        if INPUT in kwargs:
            args = (*args, kwargs.pop(INPUT))
        taps = self.host.features(*args, keep=self.task.needs(self.host.readout_rule), **kwargs)
        _refuse_graph(taps)
        return taps

    def _inside(self, *args: Any, **kwargs: Any) -> Any:
        """Tuners, trained weights or a bypass's last state in the backbone's own forward."""
        host, task = self.host, self.task
        # Refused when this was made; repeated for the type checker.
        assert isinstance(host, Host)
        headless = task.head is None and task.pool is None
        if task.side is not None:
            side: Any = task.side
            taps, output = host.run_tuned({}, Needs(side.taps), *args, side=side, **kwargs)
            _refuse_graph(taps)
            return output
        needs = task.needs(host.readout_rule)
        weights = {n.replace("/", "."): w for n, w in task.weights.items()}
        tuners = task.inline_tuners
        # Without either there is nothing to differentiate in the backbone.
        with torch.set_grad_enabled(torch.is_grad_enabled() and bool(tuners or weights)):
            features, output = host.run_tuned(tuners, needs, *args, weights=weights, **kwargs)
        # The readout that came with the features has the weights that they were made with.
        return output if headless else task(features)


def prepare_example(task: Any, example: Any) -> Any:
    """One input as training will hand it in: with zeros for what side networks prepare of each row.

    For forecasts and measurements, which are made before anything is prepared.

    Args:
        task: A task; anything else prepares nothing.
        example: With a batch axis of 1: a tensor, a tuple of it, or a mapping by keyword.
    """
    side = task.side if isinstance(task, Task) else None
    if side is None or not side.prepared_taps:
        return example
    if isinstance(example, tuple):
        if len(example) != 1:
            return example
        (example,) = example
    named = example if isinstance(example, Mapping) else {INPUT: example}
    return {**named, **{n: torch.zeros(1, *shape) for n, shape in side.prepared_taps.items()}}


def _runs_inside(task: Task) -> bool:
    """Whether it changes what the backbone computes, or wants the backbone's own output."""
    headless = task.head is None and task.pool is None
    return headless or bool(task.inline_tuners or len(task.weights))


def _refuse_graph(taps: Features) -> None:
    # A graph would keep the backbone's activations, which a bypass promises not to.
    if any(tap.grad_fn is not None for tap in taps.values()):
        raise TrainingError(
            "a tap of a bypass has a gradient graph",
            found="something switched gradients on inside the backbone's forward",
            fix="remove hooks such as enable_input_require_grads",
        )
