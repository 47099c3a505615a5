"""A host and a task as one module: what is trained, compiled, exported and wrapped in DDP."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from restuning._errors import TrainingError, WrongTaskError
from restuning._torch import names_of_sharded
from restuning.host import Extractor, Host, cannot_tune_inside
from restuning.sites import Features, Needs
from restuning.task.task import Task

INPUT = "*"
"""Name of a positional input in a batch that has to carry more by name: no argument is called so."""


_local = threading.local()
"""Of each thread: `off`, the modules whose tasks are switched off in it."""


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

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, in this thread, its tuners and trained copies are switched off; a head stays.

        What PEFT's context of this name does; other threads are not touched.

        Raises:
            WrongTaskError: A bypass with a head, which reads nothing but what its tuners make.
        """
        if self.task.side is not None and self.task.head is not None:
            raise WrongTaskError(
                "a bypass with a head cannot be switched off",
                where=self.task.method,
                found="a head on the side network's own feature",
                fix="host(x) is the backbone's own output",
            )
        before = getattr(_local, "off", ())
        _local.off = (*before, self)
        try:
            yield
        finally:
            # Without the attribute, as it was: a graph that was compiled before is still right.
            if before:
                _local.off = before
            else:
                del _local.off

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        # Asked by DistributedDataParallel when it is made around this.
        return names_of_sharded(self)

    def count_parameters(self) -> tuple[int, int]:
        """Parameters that are trained, and all of them with the backbone's."""
        trained = self.task.trainable_parameters()
        model = getattr(self.host, "model", None)
        bare = sum(p.numel() for p in model.parameters()) if isinstance(model, nn.Module) else 0
        return trained, bare + sum(p.numel() for p in self.task.parameters())

    def print_trainable_parameters(self) -> None:
        """Print one line of how many parameters are trained, in PEFT's words."""
        trained, whole = self.count_parameters()
        share = 100 * trained / max(whole, 1)
        sys.stdout.write(
            f"trainable params: {trained:,d} || all params: {whole:,d} || trainable%: {share:.4f}\n"
        )

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
        off = any(module is self for module in getattr(_local, "off", ()))
        if task.side is not None and not off:
            side: Any = task.side
            taps, output = host.run_tuned({}, Needs(side.taps), *args, side=side, **kwargs)
            _refuse_graph(taps)
            return output
        needs = Needs(("last",)) if task.side is not None else task.needs(host.readout_rule)
        weights = {n.replace("/", "."): w for n, w in task.weights.items() if not off}
        tuners = {} if off else task.inline_tuners
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
