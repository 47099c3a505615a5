"""The device that a name stands for."""

from __future__ import annotations

import torch

from restuning._errors import BackboneError, RestuningError


def choose_device(
    name: str | torch.device | None, error: type[RestuningError] = BackboneError
) -> torch.device:
    """A device by name, checked to be there.

    Args:
        name: "cpu", "cuda", "cuda:1"; None for CUDA if it is there, else the CPU.
        error: What is raised where there is no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
