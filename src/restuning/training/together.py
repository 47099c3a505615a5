"""What one process of a launcher does for all of them, and that one run at a time is made in a process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from restuning._errors import TrainingError
from restuning.runtime.processes import count_processes

T = TypeVar("T")

LONGEST = timedelta(days=7)
"""How long processes wait for the main one, which may be testing: a launcher ends them if it dies."""


def launched_state() -> PartialState:
    """Accelerate's own view of the processes, with their device; they wait for each other long enough."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return PartialState(cpu=on_cpu, timeout=LONGEST)


def launched_device() -> torch.device:
    """The one that the launcher gave this process."""
    device = launched_state().device
    assert device is not None
    return device


def from_main(make: Callable[[], T]) -> T:
    """What the main process makes, in all processes of a run; the others wait for it.

    Raises:
        TrainingError: In the others, where it failed; in the main process what it failed with.
    """
    if count_processes() == 1:
        return make()
    state = launched_state()
    answer: list[Any] = [None, ""]
    failure: BaseException | None = None
    if state.is_main_process:
        try:
            answer[0] = make()
        except BaseException as error:  # noqa: BLE001 (told to the others, and raised below)
            failure, answer[1] = error, f"{type(error).__name__}: {error}"
    broadcast_object_list(answer)
    if failure is not None:
        raise failure
    if answer[1]:
        raise TrainingError("the main process of this run failed", found=answer[1])
    return answer[0]


_lock = threading.Lock()
_owner: list[int] = []
"""The thread that trains, once for each run inside its run."""


@contextmanager
def alone() -> Iterator[None]:
    """Inside, no other thread of this process trains.

    Dropout, augmentation and first weights come from generators that a process has once, as Accelerate
    has its device and precision: two runs at a time would be other runs than each alone. Answers of
    tasks draw nothing: other threads may ask for them meanwhile.

    Raises:
        TrainingError: Another thread does.
    """
    me = threading.get_ident()
    with _lock:
        if _owner and _owner[-1] != me:
            raise TrainingError(
                "another thread of this process is training",
                found="a second run beside it, which would draw from the same generators",
                fix="train one after the other, or in a process of its own",
            )
        _owner.append(me)
    try:
        yield
    finally:
        with _lock:
            _owner.pop()


def refuse_other_device(name: str | torch.device, ours: torch.device) -> None:
    """A device by name is the one that the launcher gave this process, or is refused.

    Raises:
        TrainingError: It is another.
    """
    asked = torch.device(name)
    if asked.type != ours.type or (asked.index is not None and asked.index != ours.index):
        raise TrainingError(
            "a launcher gives every process its device",
            where=f"--device {name}",
            found=str(ours),
            fix="leave --device out (`accelerate launch --cpu` trains on the CPU)",
        )
