"""A denoiser with tasks, as one module: what is trained and wrapped for several processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from restuning._errors import TrainingError
from restuning.backbones.conditions import nest_conditions
from restuning.host import Host
from restuning.sites import first_tensor
from restuning.task import Task, Tuned


class TunedDenoiser(nn.Module):
    """`(sample, time, conditions) -> k b ...`: the answers of k tasks to one noised batch.

    Several bypasses share one backbone forward. A dot in the name of a condition stands for a dictionary
    that the denoiser takes (`added_cond_kwargs.time_ids`). A denoiser that also answers with a variance (twice
    the channels) is read up to it.

    Args:
        host: The frozen denoiser.
        tasks: One task, or several bypass tasks without a head.
        fixed: Further keyword inputs of the denoiser, the same for all batches.

    Raises:
        TrainingError: Several tasks, not all of which are bypasses.
    """

    def __init__(
        self, host: Host, tasks: Mapping[str, Task], fixed: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        if len(tasks) > 1 and any(t.side is None for t in tasks.values()):
            raise TrainingError(
                "only bypass tasks train on one backbone forward",
                found=", ".join(f"{n}: {t.method}" for n, t in tasks.items()),
                fix="train the others one at a time",
            )
        self.host, self.names, self.fixed = host, tuple(tasks), dict(fixed or {})
        self.tasks = nn.ModuleList(tasks.values())
        # One task alone may have tuners inside the denoiser; side networks need only its taps.
        self.single = Tuned(host, next(iter(tasks.values()))) if len(tasks) == 1 else None

    @property
    def task(self) -> nn.ModuleList:
        """The tasks, which are what is trained."""
        return self.tasks

    def forward(self, sample: Tensor, time: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """Answers; see the class."""
        inputs = {"timestep": time, **nest_conditions(conditions), **self.fixed}
        if self.single is not None:
            answer = first_tensor(self.single(sample, **inputs))
            assert answer is not None
            answer = answer.unsqueeze(0)
        else:
            sides = [t.side for t in self.tasks]
            answer = self.host.predict_side_by_side(sides, sample, base=False, **inputs)
        # `k b c ...`; the second half of twice as many channels is the variance.
        return answer if answer.shape[2] == sample.shape[1] else answer.chunk(2, 2)[0]


def as_denoiser(host: Host, task: Any = None, fixed: Mapping[str, Any] | None = None) -> Any:
    """The function that `sample` calls: the host's model with a task (or a `Blend`, ...) in use."""

    def denoiser(sample: Tensor, time: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        with host.using(task), torch.no_grad():
            output = host.model(
                sample, timestep=time, **nest_conditions(conditions), **(fixed or {})
            )
        answer = first_tensor(output)
        assert answer is not None
        # `b c ...`, as above.
        return answer if answer.shape[1] == sample.shape[1] else answer.chunk(2, 1)[0]

    return denoiser
