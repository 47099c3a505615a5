"""Where a bar can be drawn: on a terminal, and in a notebook that has widgets."""

from __future__ import annotations

import importlib.util
from typing import Any


def draws_bars(console: Any) -> bool:
    """Whether a bar of rich is drawn on this console; elsewhere lines are written.

    rich draws in a notebook by ipywidgets, and without it shows nothing but a warning at every refresh.

    Args:
        console: Of rich.
    """
    if console.is_jupyter:
        return importlib.util.find_spec("ipywidgets") is not None
    return console.is_terminal
