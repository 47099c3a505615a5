"""Strokes: an alphabet of invented glyphs, and the distance of every pixel to a set of segments.

Coordinates: the image spans [-1, 1] on both axes, x to the right and y downwards; one pixel is
2 / 32 = 0.0625 wide.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 32
PIXEL = 2.0 / SIZE
GLYPH_CLASSES = 300

_STROKES = 4
_POINTS = 9


class Random:
    """Shorthand for draws from one seeded generator on the CPU."""

    def __init__(self, seed: int) -> None:
        """Seed the stream; equal seeds give equal draws."""
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Return floats in [low, high) of the given shape."""
        return low + (high - low) * torch.rand(*shape, generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal floats of the given shape."""
        return torch.randn(*shape, generator=self.generator)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Return integers in [0, high) of the given shape."""
        return torch.randint(high, shape, generator=self.generator)

    def choice(self, weights: tuple[float, ...], count: int) -> Tensor:
        """Return `count` indices drawn with the given weights."""
        return torch.multinomial(
            torch.tensor(weights), count, replacement=True, generator=self.generator
        )


def make_alphabet(seed: int, classes: int = GLYPH_CLASSES) -> tuple[Tensor, Tensor]:
    """Invent the strokes of every glyph class.

    Args:
        seed: the alphabet is a function of this number alone.
        classes: number of glyph classes.

    Returns:
        Points (classes, 4, 9, 2), four strokes of nine points that fill [-1, 1] in height, and
        a mask (classes, 4) that is true for the one to four strokes in use.
    """
    random = Random(seed)
    time = torch.linspace(0, 1, _POINTS)
    points = torch.zeros(classes, _STROKES, _POINTS, 2)
    used = torch.zeros(classes, _STROKES, dtype=torch.bool)
    stroke_counts = 1 + random.choice((0.3, 0.4, 0.22, 0.08), classes)
    for index in range(classes):
        strokes = int(stroke_counts[index])
        used[index, :strokes] = True
        for stroke in range(strokes):
            # Anchors on a coarse grid make strokes meet and align, as they do in scripts.
            anchors = (random.integers(3, 4, 2) - 1.0) + random.uniform(-0.2, 0.2, 4, 2)
            if stroke and random.uniform(0, 1, 1).item() < 0.6:
                joint = int(random.integers(_POINTS, 1))
                anchors[0] = points[index, stroke - 1, joint]
            form = int(random.choice((0.35, 0.4, 0.25), 1))
            if form == 0:
                path = _polyline(anchors[:3] if strokes < 3 else anchors[:2], time)
            elif form == 1:
                path = _cubic(anchors, time)
            else:
                path = _loop(anchors[0], random, time)
            points[index, stroke] = path
        drawn = points[index, :strokes]
        low, high = drawn.amin((0, 1)), drawn.amax((0, 1))
        extent = (high - low).clamp_min(0.3)
        scale = 2 / torch.stack([extent[0].clamp_min(0.6 * extent[1]), extent[1]])
        points[index, :strokes] = (drawn - (low + high) / 2) * scale
    return points, used


def _polyline(anchors: Tensor, time: Tensor) -> Tensor:
    position = time * (len(anchors) - 1)
    start = position.long().clamp_max(len(anchors) - 2)
    share = (position - start)[:, None]
    return anchors[start] * (1 - share) + anchors[start + 1] * share


def _cubic(anchors: Tensor, time: Tensor) -> Tensor:
    left = 1 - time
    weights = torch.stack([left**3, 3 * left**2 * time, 3 * left * time**2, time**3], dim=1)
    return weights @ (anchors * torch.tensor([[1.0], [1.5], [1.5], [1.0]]))


def _loop(start: Tensor, random: Random, time: Tensor) -> Tensor:
    radii = random.uniform(0.3, 0.9, 2)
    turn = random.uniform(0.6, 1.0, 1) if random.uniform(0, 1, 1).item() < 0.5 else torch.ones(1)
    first = random.uniform(0, 2 * math.pi, 1)
    angle = first + 2 * math.pi * turn * time
    circle = torch.stack([angle.cos(), angle.sin()], dim=1)
    return start + (circle - circle[:1]) * radii


def pixel_grid() -> tuple[Tensor, Tensor]:
    """Return x and y of the pixel centres, (1, 1024, 1) each, row by row."""
    centres = (torch.arange(SIZE) + 0.5) * PIXEL - 1
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return x.reshape(1, -1, 1), y.reshape(1, -1, 1)


def segment_distance(start: Tensor, end: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """Measure every pixel against a set of segments.

    Args:
        start: (B, S, 2) first end points.
        end: (B, S, 2) second end points.
        used: (B, S) bool; segments that are false are ignored.

    Returns:
        Distance to the nearest segment (B, 1024), and whether the pixel lies inside the closed
        outlines that the segments form (B, 1024), by the even-odd rule.
    """
    x, y = pixel_grid()
    start_x, start_y = start[:, None, :, 0], start[:, None, :, 1]
    along_x, along_y = (end - start)[:, None, :, 0], (end - start)[:, None, :, 1]
    off_x, off_y = x - start_x, y - start_y
    length = (along_x**2 + along_y**2).clamp_min(1e-8)
    share = ((off_x * along_x + off_y * along_y) / length).clamp(0, 1)
    squared = (off_x - share * along_x) ** 2 + (off_y - share * along_y) ** 2
    squared = squared.masked_fill(~used[:, None], 1e4)
    crosses = (off_y < 0) != (off_y < along_y)
    left = (off_x * along_y < off_y * along_x) == (along_y > 0)
    inside = (crosses & left & used[:, None]).sum(-1) % 2 == 1
    return squared.amin(-1).sqrt(), inside


def glyph_cover(classes: Tensor, alphabet: tuple[Tensor, Tensor], random: Random) -> Tensor:
    """Write one randomly distorted glyph per image.

    Args:
        classes: (B,) glyph classes.
        alphabet: what `make_alphabet` returned.
        random: where all draws come from.

    Returns:
        Ink (B, 1024) in [0, 1].
    """
    count = len(classes)
    points = alphabet[0][classes].flatten(1, 2)
    used = alphabet[1][classes]
    # A smooth bend, the same for all strokes, and a small shift of each stroke: writers differ.
    wave = random.uniform(0.5, 1.6, count, 1, 2) * math.pi / 2
    phase = random.uniform(0, 2 * math.pi, count, 1, 2)
    # Mild distortions among the strong ones let the first steps of training find a signal.
    strength = random.uniform(0, 1, count)
    size = 0.2 * strength[:, None, None] * random.normal(count, 1, 2).clamp(-2, 2)
    points = points + size * torch.sin(points.flip(-1) * wave + phase)
    shift = 0.1 * strength.view(-1, 1, 1, 1) * random.normal(count, _STROKES, 1, 2)
    points = (points.unflatten(1, (_STROKES, _POINTS)) + shift).flatten(1, 2)
    angle = strength * (0.25 * random.normal(count)).clamp(-0.5, 0.5)
    shear = strength * (0.3 * random.normal(count)).clamp(-0.6, 0.6)
    height = random.uniform(0.55, 0.9, count)
    width = height * random.uniform(0.55, 1.05, count)
    matrix = torch.stack(
        [
            torch.stack([width * angle.cos(), height * (shear - angle.sin())], dim=1),
            torch.stack([width * angle.sin(), height * angle.cos()], dim=1),
        ],
        dim=1,
    )
    room = (0.95 - torch.stack([width, height], dim=1)).clamp_min(0.02)
    offset = room * random.uniform(-1, 1, count, 2)
    points = points @ matrix.transpose(1, 2) + offset[:, None]
    points = points.unflatten(1, (_STROKES, _POINTS))
    start, end = points[:, :, :-1].flatten(1, 2), points[:, :, 1:].flatten(1, 2)
    distance, _ = segment_distance(start, end, used.repeat_interleave(_POINTS - 1, dim=1))
    radius = random.uniform(0.7, 2.6, count, 1) * PIXEL
    softness = random.uniform(0.15, 0.8, count, 1) * PIXEL
    return torch.sigmoid((radius - distance) / softness)


def glyph_plans(alphabet: tuple[Tensor, Tensor]) -> Tensor:
    """Draw every glyph undistorted and coarsely: ink (classes, 64) of an 8 x 8 picture."""
    points = 0.8 * alphabet[0]
    start, end = points[:, :, :-1].flatten(1, 2), points[:, :, 1:].flatten(1, 2)
    distance, _ = segment_distance(start, end, alphabet[1].repeat_interleave(_POINTS - 1, dim=1))
    ink = torch.sigmoid((1.6 * PIXEL - distance) / (0.5 * PIXEL))
    return F.avg_pool2d(ink.view(-1, 1, SIZE, SIZE), SIZE // 8).flatten(1)
