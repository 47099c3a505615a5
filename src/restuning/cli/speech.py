"""How much a command says: `--quiet` and `--verbose`, and the library's own log on the screen."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from restuning.cli.visible import print_to
from restuning.runtime.processes import is_main_process

_quiet: list[bool] = []
"""Of the commands that run, one inside another."""


def is_quiet() -> bool:
    """Whether the running command says its result alone."""
    return bool(_quiet) and _quiet[-1]


class OnScreen(logging.Handler):
    """Prints the library's log aside, where words for a person go, a line each."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        name = record.levelname.lower()
        print_to(sys.stderr, f"{name}: {record.getMessage()}")


@contextmanager
def speaking(quiet: bool, verbose: bool) -> Iterator[None]:
    """Inside, a command says as much as it was asked to.

    Args:
        quiet: No lines and no bars; warnings and the result are shown.
        verbose: What the library logs for those who look for a fault, too.
    """
    handler = OnScreen(logging.DEBUG if verbose else logging.WARNING)
    logger = logging.getLogger("restuning")
    level = logger.level
    _quiet.append(quiet)
    # Of a launcher's processes one speaks.
    if is_main_process():
        logger.addHandler(handler)
    if verbose:
        logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        _quiet.pop()
        logger.removeHandler(handler)
        logger.setLevel(level)
