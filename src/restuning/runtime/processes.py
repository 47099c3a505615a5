"""The processes of one run as a launcher started them: how many there are, and which of them this is.

`accelerate launch` and `torchrun` tell every process by its environment, before anything is imported.
"""

from __future__ import annotations

import os

COUNT = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
NUMBER = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
ON_THIS_MACHINE = (
    "LOCAL_RANK",
    "MPI_LOCALRANKID",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MV2_COMM_WORLD_LOCAL_RANK",
)
"""Names of torchrun and of three kinds of MPI, as Accelerate reads them."""

COUNT_ON_MACHINE = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE")


def count_processes() -> int:
    """Of this run; 1 without a launcher."""
    return max(1, _read(COUNT, 1))


def process_number() -> int:
    """Of this process among them, from 0."""
    return _read(NUMBER, 0) if count_processes() > 1 else 0


def number_on_machine() -> int:
    """Of this process among those of this machine, from 0: the number of its GPU."""
    return _read(ON_THIS_MACHINE, 0) if count_processes() > 1 else 0


def count_on_machine() -> int:
    """Processes of this run on this machine, which share its cores; all of them where nothing is told."""
    return max(1, _read(COUNT_ON_MACHINE, count_processes())) if count_processes() > 1 else 1


def is_main_process() -> bool:
    """Whether this is the one that prints, tests and writes."""
    return process_number() == 0


def _read(names: tuple[str, ...], default: int) -> int:
    found = (os.environ.get(name, "") for name in names)
    return next((int(value) for value in found if value.isdigit()), default)
