"""Commands as processes of their own, and how they are killed."""

import os
import signal
import subprocess
import sys
import time

import pytest

PATIENCE = 400
"""Seconds; far above what a command of these tests takes alone."""
MARKS = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name == "nt", reason="SIGKILL is of POSIX systems"),
]


def started(*arguments):
    """`restuning ARGUMENTS` as a process."""
    return subprocess.Popen(
        [sys.executable, "-m", "restuning", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process):
    """What it said; it must end well."""
    told = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, told
    return told


def kill_when(process, seen):
    """Kill it as soon as `seen()` is true; it must not have ended before."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and not seen():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    told = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL, told
