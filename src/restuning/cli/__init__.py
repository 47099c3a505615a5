"""The command line: parse, call, print. Everything it does is one call of the library away."""

from __future__ import annotations

import sys

from restuning._errors import RestuningError


def main() -> None:
    """Entry point of `restuning`: errors of the user end without a traceback, with exit code 1."""
    from restuning.cli import benching as benching
    from restuning.cli import engines as engines
    from restuning.cli import imaging as imaging
    from restuning.cli import once as once
    from restuning.cli import planning as planning
    from restuning.cli.app import app  # from there, for that file holds the first commands

    try:
        app()
    except RestuningError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("stopped; the same command with the same --out goes on from there", file=sys.stderr)
        raise SystemExit(130) from None
