"""The command line as a user meets it: what is printed where, and how a command ends."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from unittest import mock

import torch

PATIENCE = 550
"""Seconds; far above what a command of the tests takes alone."""


def as_process(*arguments, cwd=None, **environment):
    """`restuning ARGUMENTS` as a process of its own.

    It costs seconds, all of them spent on imports: for tests of what only a process has (its exit
    code, its signals). Everything else is `restuning`.
    """
    return subprocess.run(
        [sys.executable, "-m", "restuning", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=PATIENCE,
        env={**os.environ, **environment},
    )


def restuning(*arguments, cwd=None, **environment):
    """`restuning ARGUMENTS` through the same entry point, in this process; as `as_process` answers."""
    from restuning.cli import main

    out, errors = io.StringIO(), io.StringIO()
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    threads, here = torch.get_num_threads(), Path.cwd()
    command = ["restuning", *map(str, arguments)]
    try:
        os.chdir(cwd or here)
        with (
            mock.patch.object(sys, "argv", command),
            mock.patch.dict(os.environ, environment),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(errors),
        ):
            status = _status_of(main)
    finally:
        os.chdir(here)
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return subprocess.CompletedProcess(command, status, out.getvalue(), errors.getvalue())


def _status_of(main):
    """The exit code the interpreter would end with, and on stderr what it would print."""
    try:
        main()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
