"""Generated photographs-like JPEGs: data of a known size that need no download."""

from __future__ import annotations

from pathlib import Path

SIDE = 256
"""Pixels; the usual size of prepared VTAB images."""


def make(folder: Path, train: int, test: int, classes: int) -> Path:
    """Write a folder in the layout of VTAB-1K with smooth random images as JPEG.

    Args:
        folder: Where to.
        train: Images of `train800.txt`; there is no `val200.txt`.
        test: Images of `test.txt`; 0 for none.
        classes: Labels 0 ... classes - 1, in turns.
    """
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    parts = (("train800.txt", train), ("test.txt", test))
    number = 0
    for name, count in parts:
        lines = []
        for place in range(count):
            coarse = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            image = Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            file = f"images/{number:05d}.jpg"
            image.save(folder / file, quality=90)
            lines.append(f"{file} {place % classes}")
            number += 1
        if count:
            (folder / name).write_text("\n".join(lines) + "\n")
    return folder
