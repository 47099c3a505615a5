"""Lines that a run prints while it works."""

import io

from rich.console import Console

from restuning.cli.results import log_to


def test_a_path_longer_than_the_terminal_is_not_broken():
    written = io.StringIO()
    path = "/data/" + "a folder with spaces/" * 9 + "store"
    log = log_to(Console(file=written, width=40))
    log(f"data  {path}")
    log(f"  from stored features: reused {path}")
    assert written.getvalue().splitlines() == [
        f"data  {path}",
        f"  from stored features: reused {path}",
    ]
