"""Drawn scenes whose truth is known: shapes that are there, how many, which way a bar lies, the ground's kind, how far all is."""

import csv
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "cross")
REACH = 12
"""Of a distance that is known, in the height of the eye."""
GROUNDS = {"sand": (196, 178, 128), "grass": (96, 144, 82), "water": (70, 110, 160)}


def draw_scene(rng, size=96, mask=None):
    """One image and its truth: ground (a class), shapes (labels), count (a number); of each pixel into `mask`."""
    ground = str(rng.choice(list(GROUNDS)))
    noise = rng.normal(0, 12, (size, size, 3)) + np.asarray(GROUNDS[ground]) + rng.normal(0, 10, 3)
    image = Image.fromarray(noise.clip(0, 255).astype(np.uint8))
    pens = [ImageDraw.Draw(each) for each in (image, mask) if each is not None]
    count = int(rng.integers(0, 9))
    # A grid of places, so that no shape hides another.
    cells = rng.permutation(9)[:count]
    kinds = rng.choice(SHAPES, rng.integers(1, 4), replace=False)
    there = set()
    for cell in cells:
        kind = str(rng.choice(kinds))
        there.add(kind)
        side = size / 3
        x, y = (cell % 3 + 0.5) * side + rng.normal(0, 1.5), (cell // 3 + 0.5) * side
        _draw_shape(pens, kind, x, y, side * rng.uniform(0.26, 0.38), rng)
    return image, {"ground": ground, "shapes": "|".join(sorted(there)), "count": count}


def _draw_shape(pens, kind, x, y, r, rng):
    # Of a mask the number of the class.
    fills = [tuple(int(c) for c in rng.integers(0, 256, 3)), 1 + SHAPES.index(kind)]
    turn = rng.uniform(0, 2 * math.pi)

    def corner(part, far=r):
        return x + far * math.cos(turn + part), y + far * math.sin(turn + part)

    for pen, fill in zip(pens, fills, strict=False):
        if kind == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        elif kind == "cross":
            for part in (0, math.pi / 2):
                ends = (*corner(part), *corner(part + math.pi))
                pen.line(ends, fill=fill, width=max(2, int(r / 2)))
        else:
            corners = 4 if kind == "square" else 3
            pen.polygon([corner(2 * math.pi * k / corners) for k in range(corners)], fill=fill)


def draw_dial(rng, size=96):
    """A dial whose hand points somewhere within half a turn, and its angle in degrees."""
    image, _ = draw_scene(np.random.default_rng(int(rng.integers(1 << 31))), size)
    pen, angle = ImageDraw.Draw(image), float(rng.uniform(-75, 75))
    middle, r = size / 2, size * rng.uniform(0.36, 0.46)
    pen.ellipse((middle - r, middle - r, middle + r, middle + r), fill=(245, 245, 240))
    tip = math.radians(angle - 90)
    end = middle + 0.9 * r * math.cos(tip), middle + 0.9 * r * math.sin(tip)
    pen.line((middle, middle, *end), fill=(190, 20, 30), width=max(2, size // 24))
    return image, angle


def write_table(folder, rows, size=96, seed=0, dial=False):
    """`table.csv` and its images; columns path, ground, shapes, count and, of dials, angle."""
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    told = []
    for number in range(rows):
        image, truth = draw_scene(rng, size)
        if dial:
            image, truth = draw_dial(rng, size)
            truth = {"angle": f"{truth:.2f}"}
        path = f"images/{number:04}.png"
        image.save(folder / path)
        told.append({"path": path, **truth})
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(told[0]))
        writer.writeheader()
        writer.writerows(told)
    return folder / "table.csv"


def write_masks(folder, rows, size=96, seed=0):
    """A folder of `images/`, `masks/` and `classes.txt`, as `restuning train` takes it."""
    folder = Path(folder)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(rows):
        mask = Image.new("L", (size, size))
        image, _ = draw_scene(rng, size, mask)
        image.save(folder / "images" / f"{number:04}.png")
        mask.save(folder / "masks" / f"{number:04}.png")
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in ("ground", *SHAPES)))
    return folder


def draw_yard(rng, size=96):
    """Boxes on a floor that goes back to the horizon, in haze, and the distance of each pixel; 0 of the sky and beyond `REACH`."""
    horizon, eye = size * rng.uniform(0.25, 0.4), size * rng.uniform(0.9, 1.3)
    y, x = np.mgrid[:size, :size] + 0.5
    depth = np.where(y > horizon + 1, eye / np.maximum(y - horizon, 1), 0.0)
    haze, floor = rng.uniform(170, 230, 3), rng.uniform(40, 140, 3)
    # Tiles of one unit: they grow smaller as the floor goes back.
    across = (x - size / 2) * depth / eye
    tiles = (np.floor(across * 2) + np.floor(depth * 2)) % 2
    colours = floor + 45 * tiles[..., None]
    for far in sorted(rng.uniform(1.6, 9.0, rng.integers(2, 6)), reverse=True):
        foot, high, wide = horizon + eye / far, eye / far * rng.uniform(0.5, 1.1), eye / far * 0.5
        middle = rng.uniform(0, size)
        box = (y < foot) & (y > foot - high) & (abs(x - middle) < wide * rng.uniform(0.5, 1.2))
        depth, colours = (
            np.where(box, far, depth),
            np.where(box[..., None], rng.uniform(0, 255, 3), colours),
        )
    seen = np.where(depth > 0, np.exp(-depth / 8), 0.0)[..., None]
    # As of a sensor: beyond its reach nothing is known.
    depth = np.where(depth < REACH, depth, 0.0)
    image = seen * colours + (1 - seen) * haze + rng.normal(0, 6, (size, size, 3))
    return Image.fromarray(image.clip(0, 255).astype(np.uint8)), depth.astype(np.float32)


def write_depths(folder, rows, size=96, seed=0):
    """A folder of `images/` and `depth/`, as `restuning train` takes it."""
    folder = Path(folder)
    for name in ("images", "depth"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(rows):
        image, depth = draw_yard(rng, size)
        image.save(folder / "images" / f"{number:04}.png")
        np.save(folder / "depth" / f"{number:04}.npy", depth)
    return folder
