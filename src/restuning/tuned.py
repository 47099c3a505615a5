"""A host and a task as one module: what is trained, compiled, exported and wrapped in DDP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from restuning._errors import TrainingError
from restuning.bypass import Bypass, Features, Needs
from restuning.host import Host
from restuning.task import Task


class Tuned(nn.Module):
    """`Tuned(host, task)(x)` gives the task's logits; only the task's parameters train.

    An inline task runs its tuners inside the backbone's forward. A bypass task runs the backbone
    once without gradient, keeping only what it needs, and then its side network. A task without
    a head and a pool gives the backbone's own output: its logits and loss, for a language model.

    Args:
        host: The frozen backbone.
        task: Inline or bypass.

    Shape:
        Input as the backbone takes it; returns `b c`.

    Raises:
        TrainingError: A tap arrived with a gradient graph (a bypass must not have one).
    """

    def __init__(self, host: Host, task: Task) -> None:
        super().__init__()
        self.host, self.task = host, task

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Logits of one batch."""
        host, task = self.host, self.task
        if task.bypass is not None:
            return self._beside(*args, **kwargs)
        needs = task.needs(host.readout_rule)
        weights = {n.replace("/", "."): w for n, w in task.weights.items()}
        tuners = task.inline_tuners
        # Linear probing has nothing to differentiate in the backbone.
        with torch.set_grad_enabled(torch.is_grad_enabled() and bool(tuners or weights)):
            kept, output = host.tuned(tuners, needs, *args, weights=weights, **kwargs)
            if task.head is None and task.pool is None:
                return output
            if weights:
                return self._with_trained_readout(kept, weights)
        return task(kept, host.readout)

    def _beside(self, *args: Any, **kwargs: Any) -> Any:
        """A bypass: its head on taps, or without one its state under the backbone's own output."""
        host, task = self.host, self.task
        bypass: Bypass = task.bypass  # type: ignore[assignment]
        inside = task.head is None and task.pool is None
        if inside:
            kept, output = host.tuned({}, Needs(bypass.taps), *args, bypass=bypass, **kwargs)
        else:
            kept, output = host.features(*args, keep=task.needs(host.readout_rule), **kwargs), None
        if any(tap.grad_fn is not None for tap in kept.values()):
            raise TrainingError(
                "a tap of a bypass has a gradient graph",
                found="something switched gradients on inside the backbone's forward",
                fix="remove hooks such as enable_input_require_grads",
            )
        return output if inside else task(kept, host.readout)

    def _with_trained_readout(self, kept: Features, weights: dict[str, Tensor]) -> Tensor:
        """The readout's norm, too, is one of the trained weights of full fine-tuning."""
        rule = self.host.readout_rule
        if not rule.norm:
            return self.task(kept, self.host.readout)
        norm = self.host.model.get_submodule(rule.norm)
        own = {
            n.removeprefix(f"{rule.norm}."): w
            for n, w in weights.items()
            if n.startswith(f"{rule.norm}.")
        }
        with torch.nn.utils.stateless._reparametrize_module(norm, own):
            return self.task(kept, self.host.readout)
