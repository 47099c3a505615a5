"""Names that come from files, as they are shown: what would steer a terminal is written out."""

from __future__ import annotations

import io
import sys
from typing import TextIO

from restuning._visible import make_visible as make_visible


def print_to(stream: TextIO, text: str) -> None:
    """Print lines of text, without what would steer a terminal."""
    print(make_visible(text, lines=True), file=stream)


def write_out_unknown() -> None:
    """Let the output write out characters that it has not, as of a terminal that is not UTF-8."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
