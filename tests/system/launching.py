"""Several processes of one run, as a launcher starts them."""

import os
import socket
import subprocess
import sys

from children import Child

PATIENCE = 300
"""Seconds; far above what a command of these tests takes alone."""


def launched(command, environment=None, cwd=None):
    """In two processes, as a user starts them; nearly all of its time is spent on imports."""
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", "0"]
    done = subprocess.run(
        [sys.executable, *launch, *map(str, command)],
        env={**os.environ, **(environment or {}), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=cwd,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def forked(command, environment=None):
    """In two processes, with what the launcher tells them; what each of them said."""
    both = start_both(command, environment)
    said = [child.communicate(timeout=PATIENCE) for child in both]
    for child, (_, errors) in zip(both, said, strict=True):
        assert child.returncode == 0, errors[-3000:]
    return said


def start_both(command, environment=None):
    """Two processes, with what the launcher tells them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**(environment or {}), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment |= {"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [
        Child(command, {**environment, "RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")
    ]


def alone(command, environment=None):
    """In one process; what it said."""
    child = Child(command, {**(environment or {}), "ACCELERATE_USE_CPU": "true"})
    said = child.communicate(timeout=PATIENCE)
    assert child.returncode == 0, said[1][-3000:]
    return said
