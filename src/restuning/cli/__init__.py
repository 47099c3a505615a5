"""The command line: parse, call, print. Everything it does is one call of the library away."""

from __future__ import annotations

import sys

from restuning._errors import RestuningError


def main() -> None:
    """Entry point of `restuning`: errors of the user end without a traceback, with exit code 1."""
    from restuning.cli.app import app

    try:
        app(prog_name="restuning")
    except RestuningError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
