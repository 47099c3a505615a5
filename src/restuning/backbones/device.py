"""The device that a name stands for."""

from __future__ import annotations

import os

import torch

from restuning._errors import BackboneError, RestuningError
from restuning.runtime.processes import count_processes, number_on_machine


def choose_device(
    name: str | torch.device | None, error: type[RestuningError] = BackboneError
) -> torch.device:
    """A device by name, checked to be there.

    Args:
        name: "cpu", "cuda", "cuda:1"; None for CUDA if it is there, else the CPU. Each process of a
            launcher has a GPU of its own, as Accelerate counts them.
        error: What is raised where there is no such device.
    """
    if name is None:
        if not torch.cuda.is_available() or _launched_on_cpu():
            return torch.device("cpu")
        if count_processes() > 1:
            return torch.device("cuda", number_on_machine() % torch.cuda.device_count())
        return torch.device("cuda")
    try:
        device = torch.device(name)
        # A name may be right and the device in another machine: that must fail here and not in
        # the middle of a run.
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as fault:
        raise error(
            "there is no such device",
            where=f"device {str(name)!r}",
            found=str(fault).strip().splitlines()[0][:200],
            fix='give "cpu", "cuda" or "cuda:1", or leave it out',
        ) from None
    return device


def _launched_on_cpu() -> bool:
    told = os.environ.get("ACCELERATE_USE_CPU", "").lower()
    return count_processes() > 1 and told in ("1", "true", "yes")
