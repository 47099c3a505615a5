"""Many tasks on one input: one backbone forward for all that allow it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import Tensor, nn

from restuning._errors import FormatError
from restuning.host import Extractor
from restuning.sites import Features, Needs
from restuning.task.bank import Bank, keep_for_all
from restuning.task.task import Task
from restuning.task.tuned import Tuned


class MultiTask(nn.Module):
    """`MultiTask(host, {name: task})(x) -> {name: logits}`.

    All bypass tasks and all heads alone share one backbone forward and one bank; every inline task
    takes a forward of its own, because its tuners change what the backbone computes.

    Args:
        host: The frozen backbone.
        tasks: By name.
        earlier: Of the same host: its banks go on answering for the tasks of theirs that are still
            here, and those that are new have a bank beside them. Adding a task to a hundred then
            takes the time of one; made afresh, all of them stand in one bank again, which is the
            fastest to ask.

    Attributes:
        banks: Of the tasks that share a forward; one, or more after an `earlier`.
        keep: What all banks read: `host.features(x, keep=keep)`; None where there is no bank.
        forwards: Backbone forwards of one batch.

    Raises:
        FormatError: There is no task.

    Cost: `forwards` backbone forwards a batch, whatever the number of bypass tasks.
    """

    def __init__(
        self, host: Extractor, tasks: Mapping[str, Task], *, earlier: MultiTask | None = None
    ) -> None:
        super().__init__()
        if not tasks:
            raise FormatError("there is no task to answer", found="none", fix="give {name: task}")
        shared = {n: t for n, t in tasks.items() if t.side is not None or _head_alone(t)}
        for task in shared.values():
            # A bank knows no host: what is read must be readable from the task.
            task.pool = task.pool or host.readout_rule.pool
        self.host, self.names = host, tuple(tasks)
        # Plain objects in a dictionary: a bank has copies, and these are who they are copies of.
        self._banked: dict[str, tuple[Task, Bank]] = {}
        before = {} if earlier is None else earlier._banked
        self._banked = {
            n: before[n] for n, t in shared.items() if n in before and before[n][0] is t
        }
        if new := {n: t for n, t in shared.items() if n not in self._banked}:
            bank = Bank(new)
            self._banked |= {n: (t, bank) for n, t in new.items()}
        banks = list(dict.fromkeys(bank for _, bank in self._banked.values()))
        self.banks = nn.ModuleList(banks)
        # By number: who exports a module may run copies of what is in it.
        self._bank_of = {n: banks.index(bank) for n, (_, bank) in self._banked.items()}
        needs = [cast("Bank", bank).keep for bank in self.banks]
        told = ", ".join(f"{n}: {t.pool}" for n, t in shared.items())
        self.keep: Needs | None = keep_for_all(needs, told) if needs else None
        alone = {n: t for n, t in tasks.items() if n not in shared}
        self.alone_names = tuple(alone)
        self.alone = nn.ModuleList(Tuned(host, task) for task in alone.values())
        self.forwards = len(alone) + bool(shared)
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Logits of every task, in the order they were given."""
        answers: dict[str, Tensor] = {}
        if self.keep is not None:
            answers |= self.read(self.host.features(*args, keep=self.keep, **kwargs))
        # Tuners inside change every later layer, so each such task takes a forward of its own.
        for name in self.alone_names:
            answers[name] = self.run_alone(name, *args, **kwargs)
        return {name: answers[name] for name in self.names}

    def read(self, features: Features, tasks: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Logits of the tasks that share a forward, of its features.

        Args:
            features: `host.features(x, keep=self.keep)`.
            tasks: Names; None for all that share one.
        """
        asked = dict.fromkeys(self._bank_of if tasks is None else tasks)
        answers: dict[str, Tensor] = {}
        for number, bank in enumerate(cast("list[Bank]", list(self.banks))):
            wanted = [n for n in asked if self._bank_of[n] == number]
            if not wanted:
                continue
            # A part of a bank is answered from a copy of that part's weights, all of it from none.
            several = len(wanted) > len(bank.names) // 4
            found = bank(features, tasks=None if several else wanted)
            # Not all of it: what was exchanged since, another bank answers under the same name.
            answers |= {name: found[name] for name in wanted}
        return {name: answers[name] for name in asked}

    def run_alone(self, task: str, *args: Any, **kwargs: Any) -> Tensor:
        """Logits of one of `alone_names`, from a backbone forward of its own."""
        return self.alone[self.alone_names.index(task)](*args, **kwargs)


def _head_alone(task: Task) -> bool:
    return task.head is not None and not task.inline_tuners and not len(task.weights)
