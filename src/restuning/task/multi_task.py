"""Many tasks on one input: one backbone forward for all that allow it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from restuning._errors import FormatError
from restuning.host import Extractor
from restuning.task.bank import Bank
from restuning.task.task import Task
from restuning.task.tuned import Tuned


class MultiTask(nn.Module):
    """`MultiTask(host, {name: task})(x) -> {name: logits}`.

    All bypass tasks and all heads alone share one backbone forward and one bank; every inline task
    takes a forward of its own, because its tuners change what the backbone computes.

    Args:
        host: The frozen backbone.
        tasks: By name.

    Attributes:
        forwards: Backbone forwards of one batch.

    Raises:
        FormatError: There is no task.

    Cost: `forwards` backbone forwards a batch, whatever the number of bypass tasks.
    """

    def __init__(self, host: Extractor, tasks: Mapping[str, Task]) -> None:
        super().__init__()
        if not tasks:
            raise FormatError("there is no task to answer", found="none", fix="give {name: task}")
        shared = {n: t for n, t in tasks.items() if t.side is not None or _head_alone(t)}
        for task in shared.values():
            # A bank knows no host: what is read must be readable from the task.
            task.pool = task.pool or host.readout_rule.pool
        self.host, self.names = host, tuple(tasks)
        self.bank = Bank(shared) if shared else None
        alone = {n: t for n, t in tasks.items() if n not in shared}
        self.alone_names = tuple(alone)
        self.alone = nn.ModuleList(Tuned(host, task) for task in alone.values())
        self.forwards = len(alone) + bool(shared)
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Logits of every task, in the order they were given."""
        answers: dict[str, Tensor] = {}
        if self.bank is not None:
            answers |= self.bank(self.host.features(*args, keep=self.bank.keep, **kwargs))
        # Tuners inside change every later layer, so each such task takes a forward of its own.
        for name, tuned in zip(self.alone_names, self.alone, strict=True):
            answers[name] = tuned(*args, **kwargs)
        return {name: answers[name] for name in self.names}


def _head_alone(task: Task) -> bool:
    return task.head is not None and not task.inline_tuners and not len(task.weights)
