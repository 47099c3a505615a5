"""Images with a mask or a depth beside each, drawn: a folder of either, as `restuning train` reads it."""

import numpy as np
from PIL import Image

CLASSES = ("ground", "disc", "bar")
WIDTH, HEIGHT = 40, 30
STEP = 1000
"""Of a depth as PNG: thousandths."""


def draw_mask(rng, width=WIDTH, height=HEIGHT):
    """A mask of two rectangles, and the image that shows it: colours are those of classes, nearly."""
    mask = np.zeros((height, width), np.uint8)
    for number in (1, 2):
        y, x = rng.integers(0, height - 8), rng.integers(0, width - 8)
        mask[y : y + 8, x : x + 8] = number
    colours = np.array([[40, 90, 40], [200, 60, 60], [60, 60, 220]])
    image = colours[mask] + rng.normal(0, 4, (height, width, 3))
    return Image.fromarray(image.clip(0, 255).astype(np.uint8)), Image.fromarray(mask)


def draw_depth(rng, width=WIDTH, height=HEIGHT):
    """An image whose brightness falls with the distance, and that distance in metres."""
    y, x = np.mgrid[:height, :width]
    slope = rng.uniform(-0.1, 0.1, 2)
    depth = (4 + slope[0] * (y - height / 2) + slope[1] * (x - width / 2)).clip(1, 8)
    left, top = rng.integers(0, width - 10), rng.integers(0, height - 10)
    depth[top : top + 10, left : left + 10] = rng.uniform(1, 3)
    grey = (260 - 30 * depth[..., None] + rng.normal(0, 3, (height, width, 3))).clip(0, 255)
    return Image.fromarray(grey.astype(np.uint8)), depth.astype(np.float32)


def save_depth(depth, file):
    """As numbers of `.npy`, or as a PNG of 16 bits."""
    if file.suffix == ".npy":
        np.save(file, depth)
    else:
        Image.fromarray((depth * STEP).round().astype(np.uint16)).save(file)


def _write(folder, beside, count, seed, draw, save, ending):
    rng = np.random.default_rng(seed)
    for name in ("images", beside):
        (folder / name).mkdir(parents=True)
    for number in range(count):
        image, told = draw(rng)
        image.save(folder / "images" / f"{number:02}.png")
        save(told, folder / beside / f"{number:02}{ending}")
    return folder


def write_masks(folder, count=12, seed=0, classes=CLASSES):
    """`images/`, `masks/` and the names of classes."""
    _write(folder, "masks", count, seed, draw_mask, Image.Image.save, ".png")
    if classes:
        (folder / "classes.txt").write_text("\n".join(classes) + "\n")
    return folder


def write_depths(folder, count=12, seed=0, ending=".npy"):
    """`images/` and `depth/`."""
    return _write(folder, "depth", count, seed, draw_depth, save_depth, ending)
