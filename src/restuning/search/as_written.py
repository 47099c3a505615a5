"""Texts of a picture as they are written: names of data, methods and settings are no formulas."""

from __future__ import annotations

from typing import Any


def take_as_written(figure: Any) -> None:
    """Let `$` in the texts of a matplotlib figure be a dollar: a name with two would else be a formula."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
