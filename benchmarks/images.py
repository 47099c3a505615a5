"""Generated photographs-like JPEGs: data of a known size that need no download."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

SIDE = 256
"""Pixels; the usual size of prepared VTAB images."""


def batch_of(model: Any, count: int, device: str) -> Any:
    """Random images as a timm model takes them, at its own size."""
    import torch

    return torch.randn(count, *model.default_cfg["input_size"], device=device)


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


def make_tars(folder: Path, tars: int, images: int, classes: int) -> Path:
    """Write tars as webdataset does, of such images, with their labels in `.cls`.

    Args:
        folder: Where to.
        tars: How many.
        images: Of all together.
        classes: Labels 0 ... classes - 1, in turns.
    """
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(tars):
        with tarfile.open(folder / f"shots-{number:04d}.tar", "w") as tar:
            for place in range(number * images // tars, (number + 1) * images // tars):
                coarse = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
                image = Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
                stream = io.BytesIO()
                image.save(stream, "JPEG", quality=90)
                label = str(place % classes).encode()
                for ending, content in (("jpg", stream.getvalue()), ("cls", label)):
                    member = tarfile.TarInfo(f"{place:07d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder
