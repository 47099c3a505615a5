"""Tasks learned one after the other: what is left of the first when the last is learned."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from restuning import methods
from restuning._errors import TrainingError
from restuning.bench.measure import predict_split
from restuning.data import Data
from restuning.host import Host
from restuning.task import Task, Tuned
from restuning.training import FitSettings, fit


@dataclass
class LearnedSequence:
    """Accuracies of a sequence of tasks.

    Attributes:
        accuracy: `accuracy[j][i]`: of task i after task j was learned (i <= j).
        answers: The classes that were answered, alike.
    """

    accuracy: list[list[float]] = field(default_factory=list)
    answers: list[list[Tensor]] = field(default_factory=list)

    @property
    def forgetting(self) -> float:
        """Mean drop of all tasks but the last, from when each was learned to the end."""
        last = self.accuracy[-1]
        return statistics.mean(self.accuracy[i][i] - last[i] for i in range(len(last) - 1))

    @property
    def changed(self) -> int:
        """Answers of earlier tasks that are not what they were when those were learned."""
        last = self.answers[-1]
        return sum(int((self.answers[i][i] != last[i]).sum()) for i in range(len(last) - 1))


def learn_in_sequence(
    host: Host,
    method: str,
    tasks: Sequence[Data],
    settings: FitSettings,
    out: Path,
    *,
    shared: bool,
    options: dict[str, Any] | None = None,
) -> LearnedSequence:
    """Learn tasks one after the other and test all earlier ones after each.

    Args:
        host: The backbone.
        method: A name of `methods`.
        tasks: Data sets, in order.
        settings: Of every training.
        out: Folder of the runs.
        shared: All tasks share one set of tuners or weights (each begins with what the one before
            left; heads are their own), as when one network is fine-tuned again and again. False:
            every task owns its tuners, as this library means it.
        options: Of the method.

    Raises:
        TrainingError: Fewer than two tasks.
    """
    if len(tasks) < 2:
        raise TrainingError("a sequence needs two tasks", found=str(len(tasks)))
    learned: list[Task] = []
    sequence = LearnedSequence()
    for place, data in enumerate(tasks):
        # Each task starts as it would alone: what differs is only what came before.
        torch.manual_seed(settings.seed)
        task = methods.build(method, host, num_classes=data.num_classes, **(options or {}))
        # Otherwise tasks own their tuners and nothing is carried on.
        if shared and learned:
            _take_up(task, learned[-1])
        fit(
            Tuned(host, task),
            data.train,
            settings=settings,
            out=out / str(place),
            collate=data.collate,
            progress=False,
        )
        learned.append(task)
        accuracies, answers = [], []
        for earlier, own in zip(learned, tasks, strict=False):
            # With shared tuners an earlier task is its own head on the tuners as they are now.
            tuned: nn.Module = Tuned(host, _join_head(earlier, task) if shared else earlier)
            classes, right = predict_split(tuned, own.test, own.collate, 64, settings.precision)
            accuracies.append(float((classes == right).mean()))
            answers.append(torch.from_numpy(classes))
        sequence.accuracy.append(accuracies)
        sequence.answers.append(answers)
    return sequence


def _take_up(task: Task, before: Task) -> None:
    """Begin with the tuners or weights of another task; the head stays the task's own."""
    mine = task.state_dict()
    # Heads have as many rows as their task has classes and cannot be taken over.
    body = {n: w for n, w in before.state_dict().items() if not n.startswith("head.")}
    task.load_state_dict({**mine, **body})


def _join_head(earlier: Task, now: Task) -> Task:
    """Put an earlier task's head on the shared tuners as they are now."""
    joined = Task.from_spec({**earlier.spec(), "labels": None})
    _take_up(joined, now)
    assert joined.head is not None
    assert earlier.head is not None
    joined.head.load_state_dict(earlier.head.state_dict())
    return joined.to(next(now.parameters()).device).eval()
