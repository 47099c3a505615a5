"""Pictures of a search: whole or not there, with their texts as they are written.

Names of data, methods and settings are no formulas.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from restuning._errors import TrainingError
from restuning._files import write_bytes


def take_as_written(figure: Any) -> None:
    """Let `$` in the texts of a matplotlib figure be a dollar: a name with two would else be a formula."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)


def write_figure(figure: Any, file: Path, dpi: int) -> None:
    """Write a matplotlib figure as PNG, its texts as they are written.

    Raises:
        TrainingError: It cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    take_as_written(figure)
    FigureCanvasAgg(figure)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=dpi, format="png")
    try:
        write_bytes(file, picture.getvalue())
    except OSError as error:
        raise TrainingError(
            "a picture cannot be written",
            where=str(file),
            found=error.strerror or str(error),
            fix="free space or make the folder writable, and run the same command again",
        ) from None
