"""Where a run computes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState, PartialState, is_initialized

from restuning._errors import TrainingError
from restuning.backbones import choose_device
from restuning.runtime.processes import count_processes
from restuning.training.together import launched_device, refuse_other_device


@contextmanager
def on_device(name: str | torch.device | None) -> Iterator[torch.device]:
    """Runs inside compute on a device; afterwards the process is as it was.

    Args:
        name: "cpu", "cuda", "cuda:1"; None for CUDA if it is there, else the CPU. Under a launcher
            every process has the device that it was given.

    Raises:
        TrainingError: There is no such device, or the launcher gave another.
    """
    if count_processes() > 1:
        ours = launched_device()
        if name is not None:
            refuse_other_device(choose_device(name, TrainingError), ours)
        with torch.cuda.device(ours) if ours.type == "cuda" else nullcontext():
            yield ours
        return
    place = choose_device(name, TrainingError)
    with ExitStack() as stack:
        if name is not None:
            # Accelerate decides once a process where it trains; each run here decides for itself.
            stack.enter_context(_fresh_accelerate())
            if place.type == "cpu":
                # By the environment, because the loop makes the Accelerator, further down.
                stack.enter_context(patch.dict(os.environ, ACCELERATE_USE_CPU="true"))
            elif place.type == "cuda":
                stack.enter_context(torch.cuda.device(place))
        yield place


@contextmanager
def _fresh_accelerate() -> Iterator[None]:
    # Processes of `accelerate launch` have their devices given.
    # Accelerate keeps device and precision on its classes, for as long as the process lives.
    ours = not is_initialized() and (
        PartialState._shared_state == {} or PartialState().num_processes == 1
    )
    if ours:
        AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        if ours:
            AcceleratorState._reset_state(reset_partial_state=True)
