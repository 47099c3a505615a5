"""Plots of a report as SVG that takes its colours from the page, so that one drawing is right in light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import singledispatch
from typing import Any
from xml.etree.ElementTree import Element, SubElement, tostring

from markupsafe import Markup

from restuning._visible import make_visible
from restuning.problems.judged import Confusion, Reliability, Scatter

WIDE, HIGH = 440.0, 270.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 14.0, 14.0, 42.0
MARKED = 40
"""Points of a line up to which each has a mark."""
MOST_CLASSES = 60
"""Classes up to which a confusion is drawn; of more, pairs are told."""
LONGEST = 16
"""Characters of a name beside a drawing; the whole name is its title."""
MOST_POINTS = 1500
"""Of a scatter; of more, so many evenly spaced ones are drawn."""
WITH_BARS = 200
"""Points up to which each has its error bar; of more, a band is drawn."""

Line = Sequence[tuple[float, float]]


class Drawing:
    """An SVG of a size, described in words for who does not see it.

    Args:
        told: What is to be seen.
        wide, high: Of the drawing's own units, which are pixels where there is room.
    """

    def __init__(self, told: str, wide: float = WIDE, high: float = HIGH) -> None:
        self.root = Element(
            "svg",
            {"class": "plot", "viewBox": f"0 0 {wide:g} {high:g}", "role": "img"},
        )
        self.root.set("aria-label", make_visible(told))
        self.root.set("style", f"max-width:{wide:g}px")

    def add(self, tag: str, into: Element | None = None, **attributes: Any) -> Element:
        """One element; `_` in names of attributes stands for `-`."""
        named = {
            name.rstrip("_").replace("_", "-"): f"{value:.5g}"
            if isinstance(value, float)
            else str(value)
            for name, value in attributes.items()
        }
        return SubElement(self.root if into is None else into, tag, named)

    def write(self, text: str, x: float, y: float, **attributes: Any) -> Element:
        """A text at a place."""
        made = self.add("text", None, x=x, y=y, **attributes)
        made.text = make_visible(text)
        return made

    def name(self, element: Element, title: str) -> None:
        """What is told where a pointer rests on an element."""
        SubElement(element, "title").text = make_visible(title)

    def markup(self) -> Markup:
        """For a page; every text in it is escaped."""
        # By ElementTree, which knows no other way to write.
        return Markup(tostring(self.root, encoding="unicode"))  # noqa: S704


class Axes:
    """Two axes with round numbers at their ticks, in a drawing.

    Args:
        drawing: Where they are drawn.
        x, y: Least and largest of what is shown.
        names: Of the axes.
        percent: Whether heights are read in percent.
        high: Of the drawing.
    """

    def __init__(
        self,
        drawing: Drawing,
        x: tuple[float, float],
        y: tuple[float, float],
        names: tuple[str, str],
        percent: bool = False,
        whole: bool = False,
        high: float = HIGH,
    ) -> None:
        self.drawing, self.high = drawing, high
        across, up = find_ticks(*x, 6, whole), find_ticks(*y, 5)
        self.x = min(x[0], across[0]), max(x[1], across[-1])
        self.y = min(y[0], up[0]), max(y[1], up[-1])
        for value in up:
            at = self.place(self.x[0], value)[1]
            drawing.add("line", None, x1=LEFT, x2=WIDE - RIGHT, y1=at, y2=at, class_="grid")
            text = f"{100 * value:.4g}%" if percent else f"{value:.4g}"
            drawing.write(text, LEFT - 7, at + 4, text_anchor="end")
        for value in across:
            at = self.place(value, self.y[0])[0]
            drawing.write(f"{value:.4g}", at, high - BOTTOM + 17, text_anchor="middle")
        drawing.write(names[0], (LEFT + WIDE - RIGHT) / 2, high - 6, text_anchor="middle")
        if names[1]:
            middle = (TOP + high - BOTTOM) / 2
            drawing.write(
                names[1], 12, middle, text_anchor="middle", transform=f"rotate(-90 12 {middle:g})"
            )

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Of a point, in the drawing's units."""
        share_x = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1)
        share_y = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1)
        return (
            LEFT + share_x * (WIDE - LEFT - RIGHT),
            self.high - BOTTOM - share_y * (self.high - TOP - BOTTOM),
        )

    def line(self, points: Line, class_: str) -> None:
        """Points joined in order."""
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (self.place(*p) for p in points))
        self.drawing.add("polyline", None, points=path, class_=f"line {class_}")


def find_ticks(least: float, most: float, count: int, whole: bool = False) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) from at or below the least to at or above the largest."""
    if not math.isfinite(least) or not math.isfinite(most):
        return [0.0, 1.0]
    if most <= least:
        least, most = least - (abs(least) / 2 or 0.5), most + (abs(most) / 2 or 0.5)
    raw = (most - least) / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * k for k in (1, 2, 5, 10) if size * k >= raw * 0.999)
    if whole:
        step = max(1.0, round(step))
        return [
            float(n) for n in range(math.ceil(least / step) * int(step), int(most) + 1, int(step))
        ]
    first, last = math.floor(least / step + 1e-9), math.ceil(most / step - 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def draw_lines(title: str, lines: Mapping[str, Line], axis: str, percent: bool = False) -> Markup:
    """Lines over epochs, the first dashed.

    Args:
        title: Of what they are.
        lines: Points by name; none of them empty.
        axis: Name of the axis across.
        percent: Whether heights are read in percent.
    """
    points = [p for line in lines.values() for p in line]
    xs, ys = zip(*points, strict=True)
    ends = "; ".join(f"{name} ends at {line[-1][1]:.4g}" for name, line in lines.items())
    drawing = Drawing(f"{title}: {ends}")
    axes = Axes(drawing, (min(xs), max(xs)), (min(ys), max(ys)), (axis, ""), percent, whole=True)
    for number, (name, line) in enumerate(lines.items()):
        own = f"c{number}"
        axes.line(line, own)
        for x, y in line if len(line) <= MARKED else line[-1:]:
            a, b = axes.place(x, y)
            mark = drawing.add("circle", None, cx=a, cy=b, r=3.0, class_=f"dot {own}")
            value = f"{y:.2%}" if percent else f"{y:.4g}"
            drawing.name(mark, f"{name}, {axis} {x:g}: {value}")
    return drawing.markup()


@singledispatch
def draw(picture: Any) -> Markup | None:
    """A record of `problems.judged` as SVG; None of one that is not drawn so."""
    return None


@draw.register
def _(picture: Confusion) -> Markup | None:
    classes = len(picture.labels)
    if not 1 < classes <= MOST_CLASSES:
        return None
    cell = max(11.0, min(34.0, 360.0 / classes))
    shorts = [shorten(label) for label in picture.labels]
    side = 12 + 6.7 * max(map(len, shorts))
    wide, high = side + classes * cell + 24, side + classes * cell + 10
    pairs = picture.pairs(3)
    told = "; ".join(f"{y} answered as {k} {n:,} of {m:,} {picture.unit}" for y, k, n, m in pairs)
    drawing = Drawing(
        f"True classes in rows, answers in columns. {told or 'No mistakes.'}", wide, high
    )
    drawing.root.set("class", "plot matrix")
    # As wide as can be read, and no wider than there is: a frame around it scrolls.
    drawing.root.set(
        "style", f"max-width:{wide:.0f}px;min-width:{min(wide, max(280, 0.8 * wide)):.0f}px"
    )
    size = max(7.5, min(12.0, 0.8 * cell))
    for n, (short, label) in enumerate(zip(shorts, picture.labels, strict=True)):
        x, y = side + (n + 0.5) * cell, side + (n + 0.5) * cell
        row = drawing.write(short, side - 6, y + size / 3, text_anchor="end", font_size=size)
        turned = max(map(len, shorts)) > 2
        place = (
            {"transform": f"translate({x + size / 3:.5g} {side - 6:.5g}) rotate(-90)"}
            if turned
            else {"transform": f"translate({x:.5g} {side - 6:.5g})", "text_anchor": "middle"}
        )
        column = drawing.write(short, 0, 0, font_size=size, **place)
        for each in (row, column):
            drawing.name(each, label)
    sums = picture.counts.sum(1).clamp(min=1).tolist()
    for y, row in enumerate(picture.counts.tolist()):
        for k, times in enumerate(row):
            share = times / sums[y]
            at = {"x": side + k * cell + 0.5, "y": side + y * cell + 0.5}
            box = drawing.add(
                "rect", None, **at, width=cell - 1, height=cell - 1, class_="cell", rx=2
            )
            if times:
                own = drawing.add(
                    "rect",
                    None,
                    **at,
                    width=cell - 1,
                    height=cell - 1,
                    rx=2,
                    class_="hit" if y == k else "miss",
                    # Few of many are still to be seen.
                    fill_opacity=0.12 + 0.88 * share**0.6,
                )
                said = f"{times:,}" if picture.unit == "times" else f"{times:,} {picture.unit}"
                drawing.name(own, f"{picture.labels[y]} answered as {picture.labels[k]}: {said}")
                # Counts of pixels have too many digits for a cell.
                text = str(times) if picture.unit == "times" else f"{100 * share:.0f}%"
                if cell >= 20 and len(text) * 6.5 < cell:
                    deep = 0.12 + 0.88 * share**0.6 > 0.6
                    drawing.write(
                        text,
                        at["x"] + cell / 2 - 0.5,
                        at["y"] + cell / 2 + 3.5,
                        text_anchor="middle",
                        font_size=11,
                        class_="on" if deep else "in",
                    )
            else:
                drawing.name(box, f"{picture.labels[y]} answered as {picture.labels[k]}: 0")
    return drawing.markup()


@draw.register
def _(picture: Reliability) -> Markup | None:
    if not picture.counts:
        return None
    total = sum(picture.counts)
    off = max(
        zip(picture.confidence, picture.right, picture.counts, strict=True),
        key=lambda each: abs(each[0] - each[1]) * each[2],
    )
    drawing = Drawing(
        f"Probability that was told against share of right answers, {total:,} answers. Furthest off: told "
        f"{off[0]:.0%}, right {off[1]:.0%}, {off[2]:,} answers"
    )
    axes = Axes(
        drawing,
        (0, 1),
        (0, 1),
        ("probability that was told", "share of right answers"),
        percent=True,
    )
    axes.line([(0, 0), (1, 1)], "diagonal")
    points = list(zip(picture.confidence, picture.right, strict=True))
    for (told, right), count in zip(points, picture.counts, strict=True):
        (x, y), (_, ideal) = axes.place(told, right), axes.place(told, told)
        drawing.add("line", None, x1=x, x2=x, y1=y, y2=ideal, class_="gap")
        mark = drawing.add(
            "circle", None, cx=x, cy=y, r=3.5 + 8 * math.sqrt(count / total), class_="dot c1"
        )
        drawing.name(mark, f"{count:,} answers told at {told:.1%} on average: {right:.1%} right")
    return drawing.markup()


@draw.register
def _(picture: Scatter) -> Markup | None:
    if not picture.truth:
        return None
    step = -(-len(picture.truth) // MOST_POINTS)
    points = list(zip(picture.truth, picture.answers, strict=True))[::step]
    values = [value for point in points for value in point if math.isfinite(value)]
    if not values:
        return None
    least, most = min(values), max(values)
    error = picture.error
    within = "" if error is None else f", within {error:.3g} of the truth on rows left out"
    drawing = Drawing(
        f"{picture.name}: what was answered against what is true{within}", high=WIDE * 0.8
    )
    axes = Axes(drawing, (least, most), (least, most), ("true", "answered"), high=WIDE * 0.8)
    low, high = max(axes.x[0], axes.y[0]), min(axes.x[1], axes.y[1])
    bars = error is not None and len(points) <= WITH_BARS
    if error is not None and not bars:
        corners = [
            (low, low - error),
            (high, high - error),
            (high, high + error),
            (low, low + error),
        ]
        clipped = [axes.place(x, min(max(y, axes.y[0]), axes.y[1])) for x, y in corners]
        drawing.add(
            "polygon", None, points=" ".join(f"{a:.1f},{b:.1f}" for a, b in clipped), class_="band"
        )
    axes.line([(low, low), (high, high)], "diagonal")
    for truth, told in points:
        if not math.isfinite(truth) or not math.isfinite(told):
            continue
        x, y = axes.place(truth, told)
        if bars and error is not None:
            ends = [
                axes.place(truth, min(max(told + sign * error, axes.y[0]), axes.y[1]))[1]
                for sign in (-1, 1)
            ]
            drawing.add("line", None, x1=x, x2=x, y1=ends[0], y2=ends[1], class_="error")
        mark = drawing.add("circle", None, cx=x, cy=y, r=3.0, class_="dot c1 soft")
        drawing.name(mark, f"true {truth:.4g}, answered {told:.4g}")
    return drawing.markup()


def shorten(name: str, most: int = LONGEST) -> str:
    """A name beside a drawing, cut where it is long."""
    name = make_visible(name)
    return name if len(name) <= most else f"{name[: most - 1]}…"
