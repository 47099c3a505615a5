"""Procedural images for pre-training the embedded backbone: glyphs, shapes and textures.

Every image is 32 x 32 pixels, RGB, float32 in [0, 1], and is computed from numbers drawn out of
one seeded generator; no picture is read from anywhere. Three kinds are drawn:

* a glyph: one character of a random alphabet (strokes that are lines, curves or loops), bent,
  slanted, moved, thickened, blurred and coloured at random;
* shapes: one to four filled or outlined shapes of one class, in cells of a 3 x 3 grid;
* a texture: a grating, plaid, ring pattern or noise of random orientation and frequency.

Coordinates: the image spans [-1, 1] on both axes, x to the right and y downwards; one pixel is
2 / 32 = 0.0625 wide.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from strokes import GLYPH_CLASSES, PIXEL, SIZE, Random, glyph_cover, pixel_grid, segment_distance
from torch import Tensor

GENERATOR_VERSION = 1
KINDS = ("glyph", "shape", "texture")
KIND_SHARES = (0.7, 0.15, 0.15)
SHAPES = ("disc", "triangle", "square", "pentagon", "bar", "cross", "star", "arrow")
TEXTURES = ("sine grating", "square grating", "plaid", "rings", "noise")
MAX_COUNT = 4
CELLS = 9
ORIENTATIONS = 8
FREQUENCIES = 5
HUES = 7
NO_LABEL = -100

# Number of classes of each classification target; "cells" is CELLS yes/no answers instead.
TARGETS = {
    "kind": len(KINDS),
    "glyph": GLYPH_CLASSES,
    "shape": len(SHAPES),
    "outline": 2,
    "count": MAX_COUNT,
    "texture": len(TEXTURES),
    "orientation": ORIENTATIONS,
    "frequency": FREQUENCIES,
    "hue": HUES,
    "polarity": 2,
}

_VERTICES = 16


@dataclass
class Batch:
    """Images with everything that was drawn.

    Attributes:
        images: (B, 3, 32, 32) float32 in [0, 1].
        labels: for each name in `TARGETS` a (B,) int64 tensor, `NO_LABEL` where it has no meaning.
        cells: (B, 9) float32, 1 where a grid cell holds a shape; only for shape images.
    """

    images: Tensor
    labels: dict[str, Tensor]
    cells: Tensor


def draw(
    count: int, seed: int, alphabet: tuple[Tensor, Tensor], shares: tuple[float, ...] = KIND_SHARES
) -> Batch:
    """Draw a batch; equal arguments give equal images.

    Args:
        count: number of images B.
        seed: everything random in the batch follows from it.
        alphabet: what `strokes.make_alphabet` returned.
        shares: how often each of `KINDS` is drawn.

    Returns:
        The images with their labels.
    """
    random = Random(seed)
    labels = {name: torch.full((count,), NO_LABEL) for name in TARGETS}
    cells = torch.zeros(count, CELLS)
    cover = torch.zeros(count, SIZE * SIZE)
    labels["kind"] = random.choice(shares, count)
    glyphs, shapes, textures = ((labels["kind"] == kind).nonzero()[:, 0] for kind in range(3))
    if len(glyphs):
        labels["glyph"][glyphs] = random.integers(len(alphabet[0]), len(glyphs))
        cover[glyphs] = glyph_cover(labels["glyph"][glyphs], alphabet, random)
    if len(shapes):
        cover[shapes], cells[shapes] = _shape_cover(shapes, labels, random)
    if len(textures):
        cover[textures] = _texture_cover(textures, labels, random)
    images = _photograph(_colour(cover, labels, random), random)
    return Batch(images, labels, cells)


def _outlines() -> Tensor:
    """Return the corners of every shape class, (8, 16, 2), padded by repeating the last."""
    outlines = []
    for corners in (16, 3, 4, 5):
        angle = torch.arange(corners) * 2 * math.pi / corners
        outlines.append(torch.stack([angle.sin(), -angle.cos()], dim=1))
    outlines.append(torch.tensor([[-1, -0.3], [1, -0.3], [1, 0.3], [-1, 0.3]]))
    arm = torch.tensor([[-0.3, -1], [0.3, -1], [0.3, -0.3]])
    quarter = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    turns = [torch.linalg.matrix_power(quarter, power) for power in range(4)]
    outlines.append(torch.cat([arm @ turn for turn in turns]))
    angle = torch.arange(10) * math.pi / 5
    radius = torch.tensor([1.0, 0.42]).repeat(5)[:, None]
    outlines.append(radius * torch.stack([angle.sin(), -angle.cos()], dim=1))
    arrow = [[0, -1], [0.8, 0], [0.3, 0], [0.3, 1], [-0.3, 1], [-0.3, 0], [-0.8, 0]]
    outlines.append(torch.tensor(arrow))
    padded = [torch.cat([o, o[-1:].expand(_VERTICES - len(o), 2)]) for o in outlines]
    return torch.stack(padded)


def _shape_cover(rows: Tensor, labels: dict[str, Tensor], random: Random) -> tuple[Tensor, Tensor]:
    """Draw up to four shapes of one class per image; fill in the labels of these rows."""
    count = len(rows)
    shape, outline = random.integers(len(SHAPES), count), random.integers(2, count)
    number = random.integers(MAX_COUNT, count)
    labels["shape"][rows], labels["outline"][rows], labels["count"][rows] = shape, outline, number
    order = random.uniform(0, 1, count, CELLS).argsort(1)[:, :MAX_COUNT]
    used = torch.arange(MAX_COUNT) <= number[:, None]
    cells = torch.zeros(count, CELLS).scatter(1, order, used.float())
    column, row = order % 3 - 1, torch.div(order, 3, rounding_mode="floor") - 1
    centre = torch.stack([column, row], dim=-1) * 0.63 + random.uniform(
        -0.05, 0.05, count, MAX_COUNT, 2
    )
    radius = random.uniform(0.2, 0.32, count, MAX_COUNT, 1, 1)
    angle = random.uniform(0, 2 * math.pi, count, MAX_COUNT)
    rotation = torch.stack(
        [
            torch.stack([angle.cos(), -angle.sin()], dim=-1),
            torch.stack([angle.sin(), angle.cos()], dim=-1),
        ],
        dim=-2,
    )
    corners = _outlines()[shape][:, None] @ rotation * radius + centre[:, :, None]
    start, end = corners.flatten(1, 2), corners.roll(-1, dims=2).flatten(1, 2)
    distance, inside = segment_distance(start, end, used.repeat_interleave(_VERTICES, dim=1))
    signed = torch.where(inside, distance, -distance)
    line = random.uniform(0.4, 0.8, count, 1) * PIXEL - distance
    depth = torch.where(outline[:, None] == 1, line, signed)
    return torch.sigmoid(depth / (0.3 * PIXEL)), cells


def _texture_cover(rows: Tensor, labels: dict[str, Tensor], random: Random) -> Tensor:
    """Draw one texture per image; fill in the labels of these rows."""
    count = len(rows)
    texture, frequency = random.integers(len(TEXTURES), count), random.integers(FREQUENCIES, count)
    orientation = random.integers(ORIENTATIONS, count)
    labels["texture"][rows], labels["frequency"][rows] = texture, frequency
    # Plaids, rings and noise look the same in several directions, so their angle is not asked.
    labels["orientation"][rows] = torch.where(texture < 2, orientation, NO_LABEL)
    angle = (orientation + random.uniform(-0.4, 0.4, count))[:, None] * math.pi / ORIENTATIONS
    cycles = 1.5 * 1.5 ** (frequency + random.uniform(-0.4, 0.4, count))[:, None]
    phase = random.uniform(0, 2 * math.pi, count, 1)
    x, y = (axis[..., 0] for axis in pixel_grid())
    across = torch.sin(math.pi * cycles * (x * angle.cos() + y * angle.sin()) + phase)
    along = torch.sin(math.pi * cycles * (y * angle.cos() - x * angle.sin()) + phase)
    centre = random.uniform(-0.5, 0.5, count, 2)
    from_centre = ((x - centre[:, :1]) ** 2 + (y - centre[:, 1:]) ** 2).sqrt()
    rings = torch.sin(math.pi * cycles * from_centre + phase)
    values = torch.stack([across, (4 * across).clamp(-1, 1), across * along, rings, rings])
    cover = values[texture, torch.arange(count)] / 2 + 0.5
    for index in (texture == len(TEXTURES) - 1).nonzero()[:, 0].tolist():
        grid = random.uniform(0, 1, 1, 1, *[2 + int(2 * cycles[index])] * 2)
        cover[index] = F.interpolate(grid, size=SIZE, mode="bilinear").flatten()
    return cover


def _colour(cover: Tensor, labels: dict[str, Tensor], random: Random) -> Tensor:
    """Turn ink (B, 1024) into colour images (B, 3, 32, 32); fill in hue and polarity."""
    count = len(cover)
    coloured = random.uniform(0, 1, count) < 0.5
    hue = torch.where(coloured, 1 + random.integers(HUES - 1, count), 0)
    polarity = random.integers(2, count)
    labels["hue"] = hue
    # A texture has no foreground that could be the brighter part.
    labels["polarity"] = torch.where(labels["kind"] < 2, polarity, NO_LABEL)
    contrast = random.uniform(0.35, 1.0, count)
    dark = random.uniform(0, 1, count) * (1 - contrast)
    front = (dark + contrast * polarity)[:, None]
    back = (dark + contrast * (1 - polarity))[:, None]
    angle = (hue + random.uniform(-0.4, 0.4, count))[:, None] * 2 * math.pi / (HUES - 1)
    chroma = torch.cos(angle - torch.arange(3) * 2 * math.pi / 3) * coloured[:, None]
    front = (0.15 + 0.7 * front) * coloured[:, None] + front * ~coloured[:, None] + 0.35 * chroma
    tint = 0.08 * random.normal(count, 3) * coloured[:, None]
    images = back[..., None] + tint[..., None] + cover[:, None] * (front - back)[..., None]
    return images.unflatten(2, (SIZE, SIZE))


def _photograph(images: Tensor, random: Random) -> Tensor:
    """Degrade images (B, 3, 32, 32) as cameras and scanners do: resolution, shading, noise."""
    count = len(images)
    resolution = random.choice((0.6, 0.2, 0.2), count)
    for step, factor in ((1, 2), (2, 4)):
        rows = (resolution == step).nonzero()[:, 0]
        if len(rows):
            coarse = F.avg_pool2d(images[rows], factor)
            images[rows] = F.interpolate(coarse, size=SIZE, mode="bicubic")
    x, y = (axis.view(1, 1, SIZE, SIZE) for axis in pixel_grid())
    slope = 0.08 * random.normal(count, 2, 1, 1, 1)
    images = images + slope[:, 0] * x + slope[:, 1] * y
    level = 0.1 * random.uniform(0, 1, count, 1, 1, 1) ** 2
    return (images + level * random.normal(count, 3, SIZE, SIZE)).clamp(0, 1)


def contact_sheet(batch: Batch, columns: int = 16) -> Tensor:
    """Lay a batch out as one picture, (H, W, 3) uint8, row by row."""
    images = F.pad(batch.images[: len(batch.images) // columns * columns], (1, 1, 1, 1))
    tiles = images.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2)
    return (tiles.flatten(2, 3).flatten(0, 1) * 255).to(torch.uint8)
