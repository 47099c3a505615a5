"""Pictures of samples, side by side."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

GAP = 2
"""Pixels between two pictures."""


def save_grid(images: Tensor, path: str | Path, columns: int, scale: int = 1) -> Path:
    """Write `n 3 h w` in 0 to 1 as one PNG, row by row.

    Args:
        images: Samples.
        path: The file; its folder is made.
        columns: Pictures in a row.
        scale: Whole pixels that each becomes, for small pictures.
    """
    pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    pixels = pixels.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    count, _, height, width = pixels.shape
    rows = -(-count // columns)
    # White, and without a gap after the last row and column.
    sheet = torch.full(
        (3, rows * (height + GAP) - GAP, columns * (width + GAP) - GAP), 255, dtype=torch.uint8
    )
    for place, image in enumerate(pixels):
        top, left = (place // columns) * (height + GAP), (place % columns) * (width + GAP)
        sheet[:, top : top + height, left : left + width] = image
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet.permute(1, 2, 0).contiguous().numpy()).save(path)
    return path
