"""Images as small pictures that lie in the page itself."""

from __future__ import annotations

import base64
import io

from PIL import Image

SIDE = 160
"""Pixels of the longer side, twice what is shown: sharp on dense screens."""
PLAIN = 64
"""Pixels up to which an image stays as it is, without loss."""


def make_data_uri(image: Image.Image, side: int = SIDE, exact: bool = False) -> str:
    """A PNG or JPEG of at most so many pixels a side as a data URI: a page shows it wherever it is taken.

    Args:
        image: Any.
        side: The longer one, at most.
        exact: Without loss, as colours that stand for classes are.
    """
    small = image.convert("RGB")
    if max(small.size) > side:
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
    plain = exact or max(small.size) <= PLAIN
    stream = io.BytesIO()
    # Nothing of the file's own (places, cameras) is handed on.
    if plain:
        small.save(stream, "PNG", optimize=True)
    else:
        small.save(stream, "JPEG", quality=82)
    kind = "png" if plain else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
