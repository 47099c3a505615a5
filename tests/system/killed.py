"""Commands as processes of their own, and how they are killed."""

import os
import signal
import time

import pytest

from children import Child

PATIENCE = 400
"""Seconds; far above what a command of these tests takes alone."""
MARKS = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name == "nt", reason="SIGKILL is of POSIX systems"),
]


def started(*arguments):
    """`restuning ARGUMENTS` as a process."""
    return Child(["-m", "restuning", *arguments])


def ended(process):
    """What it said; it must end well."""
    told, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, told + errors
    return told


def kill_when(process, seen):
    """Kill it as soon as `seen()` is true; it must not have ended before."""
    killed, told = try_to_kill(process, seen)
    assert killed, told


def try_to_kill(process, seen):
    """Kill it as soon as `seen()` is true; whether it was killed, and not ended well before, and what it said."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and not seen():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    told = "".join(process.communicate())
    assert process.returncode in (0, -signal.SIGKILL), told
    return process.returncode != 0, told
