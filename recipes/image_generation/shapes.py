"""Captioned pictures drawn by a grammar: a shape, its colour, size and place, in one of two styles.

    a large red circle at the top left

Style "plain" fills the shape on dark ground. Style "paper" draws its outline, hatched, on light
ground; its captions are the same, so it is the domain that shifts. The shape "star" is left out of
what a base model is trained on: it is the new concept.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

SIZE = 32
SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {
    "red": (220, 50, 47),
    "green": (60, 180, 75),
    "blue": (60, 110, 230),
    "yellow": (240, 200, 40),
    "purple": (160, 70, 200),
    "white": (235, 235, 235),
}
SIZES = {"small": 4.5, "large": 8.0}
PLACES = {
    "top left": (10, 10),
    "top right": (22, 10),
    "bottom left": (10, 22),
    "bottom right": (22, 22),
}
WORDS = sorted(
    {
        "<pad>",
        "<end>",
        "a",
        "at",
        "the",
        *SHAPES,
        *COLOURS,
        *SIZES,
        *(w for p in PLACES for w in p.split()),
    }
)
LENGTH = 10
ATTRIBUTES = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "place": tuple(PLACES),
}


@dataclass(frozen=True)
class Scene:
    """What a picture shows."""

    shape: str
    colour: str
    size: str
    place: str

    @property
    def caption(self) -> str:
        """In words."""
        return f"a {self.size} {self.colour} {self.shape} at the {self.place}"

    @property
    def labels(self) -> list[int]:
        """Class of every attribute."""
        return [names.index(getattr(self, a)) for a, names in ATTRIBUTES.items()]


def scenes(count: int, seed: int, shapes: tuple[str, ...] = SHAPES[:3]) -> list[Scene]:
    """Random scenes of some shapes."""
    draw = random.Random(seed)
    return [
        Scene(
            draw.choice(shapes),
            draw.choice(tuple(COLOURS)),
            draw.choice(tuple(SIZES)),
            draw.choice(tuple(PLACES)),
        )
        for _ in range(count)
    ]


def picture(scene: Scene, style: str, seed: int) -> Tensor:
    """`3 32 32` in -1 to 1; shapes are a little off their place, and grounds a little uneven."""
    draw = random.Random(seed)
    big = 4
    paper = style == "paper"
    tone = draw.randint(225, 250) if paper else draw.randint(10, 40)
    image = Image.new("RGB", (SIZE * big, SIZE * big), (tone, tone, max(0, tone - 12)))
    pen = ImageDraw.Draw(image)
    x, y = ((v + draw.uniform(-1.5, 1.5)) * big for v in PLACES[scene.place])
    r = SIZES[scene.size] * draw.uniform(0.92, 1.08) * big
    colour = COLOURS[scene.colour]
    if paper and scene.colour == "white":
        colour = (120, 120, 120)
    points = _outline(scene.shape, x, y, r)
    if paper:
        mask = Image.new("L", image.size, 0)
        ImageDraw.Draw(mask).polygon(points, fill=255)
        lines = Image.new("RGB", image.size, (tone, tone, max(0, tone - 12)))
        hatch = ImageDraw.Draw(lines)
        for start in range(-SIZE * big, SIZE * big, 3 * big):
            hatch.line([(start, 0), (start + SIZE * big, SIZE * big)], fill=colour, width=big)
        image.paste(lines, mask=mask)
        pen.line([*points, points[0]], fill=colour, width=int(1.5 * big), joint="curve")
    else:
        pen.polygon(points, fill=colour)
    image = image.resize((SIZE, SIZE), Image.Resampling.BOX)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def _outline(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    if shape == "square":
        return [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)]
    corners = {"circle": 40, "triangle": 3, "star": 10}[shape]
    found = []
    for i in range(corners):
        angle = 2 * np.pi * i / corners - np.pi / 2
        own = r * (0.42 if shape == "star" and i % 2 else 1.1 if shape != "circle" else 1.0)
        found.append((x + own * float(np.cos(angle)), y + own * float(np.sin(angle))))
    return found


def pictures(shown: list[Scene], style: str, seed: int) -> Tensor:
    """`n 3 32 32`."""
    return torch.stack([picture(s, style, seed * 1_000_003 + i) for i, s in enumerate(shown)])


def tokens(captions: list[str]) -> Tensor:
    """A word a token, `n 10`; the empty caption is padding after its end."""
    rows = []
    for caption in captions:
        row = [WORDS.index(w) for w in [*caption.split(), "<end>"]]
        rows.append(row + [WORDS.index("<pad>")] * (LENGTH - len(row)))
    return torch.tensor(rows)
