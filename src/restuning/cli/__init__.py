"""The command line: parse, call, print. Everything it does is one call of the library away."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from restuning._errors import RestuningError, RestuningWarning
from restuning.cli.visible import print_to, write_out_unknown
from restuning.runtime.processes import process_number


def main() -> None:
    """Entry point of `restuning`: errors of the user end without a traceback, with exit code 1."""
    from restuning.cli.app import app

    number = process_number()
    write_out_unknown()
    try:
        with _say_nothing() if number else _say_warnings():
            app(prog_name="restuning")
    except RestuningError as error:
        which = f"process {number}: " if number else ""
        print_to(sys.stderr, f"{which}{type(error).__name__}: {error}")
        raise SystemExit(1) from None


@contextmanager
def _say_nothing() -> Iterator[None]:
    """Of the processes of a launcher one speaks; the others tell only what stopped them."""
    with (
        open(os.devnull, "w", encoding="utf-8") as silent,
        redirect_stdout(silent),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _say_warnings() -> Iterator[None]:
    """Our warnings as sentences, each once; those of other libraries as Python shows them."""
    with warnings.catch_warnings():
        others, told = warnings.showwarning, set[str]()

        def show(message: Any, category: type[Warning], *place: Any, **more: Any) -> None:
            if not issubclass(category, RestuningWarning):
                others(message, category, *place, **more)
            elif str(message) not in told:
                # Data are listed more than once in a run.
                told.add(str(message))
                print_to(sys.stderr, f"warning: {message}")

        warnings.simplefilter("always", RestuningWarning)
        warnings.showwarning = show
        yield
