"""Processes of their own that start at once: forked from one that has imported what they need.

Starting Python and importing torch and its company takes seconds of a processor, a fork takes
milliseconds, and what is forked is a process like any other: it can be killed, it has an exit
code, an environment and a `sys.path` of its own. The one they are forked from has imported and
nothing else, unlike the one that runs the tests.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path

IMPORTED = (
    "accelerate",
    "diffusers.models.unets.unet_2d_condition",
    "torch.distributed",
    "torch.nn.parallel",
    "timm",
    "torchmetrics.classification",
    "restuning.cli.app",
    "restuning.diffusion",
    "restuning.features",
    "restuning.methods",
    "restuning.training",
)
START = "spawn" if os.name == "nt" else "forkserver"
"""Also for `torch.multiprocessing.start_processes`: one server serves all."""

multiprocessing.set_forkserver_preload(["__main__", *IMPORTED])


class Child:
    """`python COMMAND` with what `subprocess.Popen` answers; `environment` is added to ours."""

    def __init__(self, command, environment=None):
        self._folder = tempfile.TemporaryDirectory()
        self._said = [Path(self._folder.name, name) for name in ("out", "err")]
        context = multiprocessing.get_context(START)
        self._process = context.Process(
            target=_run, args=([*map(str, command)], environment or {}, self._said)
        )
        self._process.start()

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        self._process.join(0)
        return self.returncode

    def send_signal(self, number):
        # It may have ended since anybody looked.
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    def kill(self):
        self._process.kill()

    def communicate(self, timeout=None):
        """What it wrote to stdout and to stderr, once it has ended."""
        self._process.join(timeout)
        if self._process.is_alive():
            self.kill()
            self._process.join()
            raise TimeoutError(f"{timeout} s: {self._read()}")
        return self._read()

    def _read(self):
        return tuple(p.read_text() if p.exists() else "" for p in self._said)


def _run(command, environment, said):
    """The child: as if Python had been started with this command and environment."""
    for stream, path in zip((sys.stdout, sys.stderr), said, strict=True):
        stream.flush()
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    os.environ.update(environment)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    import torch

    # A pool that was set up before the fork knows nothing of OMP_NUM_THREADS.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    first, *arguments = command
    if first == "-c":
        code, *arguments = arguments
        sys.argv = ["-c", *arguments]
        exec(compile(code, "-c", "exec"), {"__name__": "__main__"})  # noqa: S102
    elif first == "-m":
        module, *arguments = arguments
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *arguments]
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")


def stop():
    """End the server, so that what its children took is counted as ours."""
    if START == "forkserver":
        # No public way; without it the server ends by itself, a moment after us.
        forkserver._forkserver._stop()
