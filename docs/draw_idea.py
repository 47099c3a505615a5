"""Draw `docs/idea.svg`, the picture of the idea: `python docs/draw_idea.py`.

Plain SVG text, no library: every place is a number below, so that a line ends where its box begins.
The picture brings its own background, in a light and a dark form (`prefers-color-scheme`), because
a page that shows it as an image may have either.
"""

from pathlib import Path

WIDTH, HEIGHT = 800, 476
PICTURE = Path(__file__).with_name("idea.svg")

STYLE = """
  .page { fill: #ffffff; stroke: #d5dbe3 }
  .panel { fill: #f5f7fa }
  .card { fill: #ffffff; stroke: #b9c2cf }
  .frozen { fill: #dbe4f0; stroke: #7d8fa8 }
  .trained { fill: #ffd9a8; stroke: #c9781c }
  .sum { fill: #ffffff; stroke: #39424e; stroke-width: 1.5 }
  .stream { stroke: #39424e }
  .delta { stroke: #c9781c }
  .value { stroke: #6b7889; stroke-dasharray: 5 4 }
  .stop { stroke: #c8324a; stroke-width: 2.5 }
  .frame { fill: none; stroke: #7d8fa8; stroke-dasharray: 2 4 }
  .line { fill: none; stroke-width: 1.6 }
  .stream-head { fill: #39424e }
  .delta-head { fill: #c9781c }
  .value-head { fill: #6b7889 }
  text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
         fill: #1d232b; text-anchor: middle }
  .title { font-size: 16px; font-weight: 600; text-anchor: start }
  .start { text-anchor: start }
  .quiet { fill: #55606e; font-size: 12px }
  .red { fill: #b3253c; font-size: 12px }
  .i { font-style: italic }
  .b { fill: #1d232b }
  @media (prefers-color-scheme: dark) {
    .page { fill: #16191f; stroke: #343b46 }
    .panel { fill: #1f242c }
    .card { fill: #272d37; stroke: #566172 }
    .frozen { fill: #34435a; stroke: #8397b4 }
    .trained { fill: #7a4a14; stroke: #f0a54a }
    .sum { fill: #16191f; stroke: #d7dde6 }
    .stream { stroke: #d7dde6 }
    .delta { stroke: #f0a54a }
    .value { stroke: #9aa7b8 }
    .stop { stroke: #ff7088 }
    .frame { stroke: #8397b4 }
    .stream-head { fill: #d7dde6 }
    .delta-head { fill: #f0a54a }
    .value-head { fill: #9aa7b8 }
    text, .b { fill: #eef1f5 }
    .quiet { fill: #aab5c3 }
    .red { fill: #ff8fa2 }
  }
"""

ALT = (
    "Left: in a frozen block, a tuner beside the attention, one beside the feed-forward and one beside "
    "the whole block each read the stream and add to it. Right: in the bypass the streams of a frozen "
    "backbone are passed on as values only; a side network of horizontal and vertical tuners reads "
    "them, one for each task, and no gradient enters the backbone."
)

RECURSION = (
    '<tspan class="i b">x′</tspan><tspan class="i b" dy="3" font-size="9">l</tspan>'
    '<tspan class="i b" dy="-3"> = λ h(x</tspan><tspan class="i b" dy="3" font-size="9">l</tspan>'
    '<tspan class="i b" dy="-3">) + (1 − λ) v(x′</tspan>'
    '<tspan class="i b" dy="3" font-size="9">l−1</tspan><tspan class="i b" dy="-3">)</tspan>'
)


def box(x: float, y: float, width: float, words: str, kind: str, height: float = 34) -> str:
    """A named box about its centre."""
    return (
        f'<rect class="{kind}" x="{x - width / 2:g}" y="{y - height / 2:g}" width="{width:g}" '
        f'height="{height:g}" rx="6"/>\n{text(x, y + 4.5, words)}'
    )


def text(x: float, y: float, words: str, kind: str = "b") -> str:
    """Words with their baseline at y."""
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{words}</text>'


def arrow(kind: str, *points: tuple[float, float], head: bool = True) -> str:
    """A line with rounded corners through points, its head ending exactly in the last one."""
    (x0, y0), (x1, y1) = points[-2:]
    length = max(abs(x1 - x0), abs(y1 - y0))
    ux, uy = (x1 - x0) / length, (y1 - y0) / length
    # The line stops inside its head, so that no blunt end shows at the tip.
    points = (*points[:-1], (x1 - 5 * ux, y1 - 5 * uy)) if head else points
    path = f"M{points[0][0]:g} {points[0][1]:g}"
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        path += (
            f" L{_towards(corner, before)} Q{corner[0]:g} {corner[1]:g} {_towards(corner, after)}"
        )
    path += f" L{points[-1][0]:g} {points[-1][1]:g}"
    drawn = f'<path class="line {kind}" d="{path}"/>'
    if head:
        left, right = (
            (x1 - 8 * ux - 4 * uy, y1 - 8 * uy + 4 * ux),
            (
                x1 - 8 * ux + 4 * uy,
                y1 - 8 * uy - 4 * ux,
            ),
        )
        tip = " ".join(f"{x:g},{y:g}" for x, y in ((x1, y1), left, right))
        drawn += f'\n<polygon class="{kind}-head" points="{tip}"/>'
    return drawn


def _towards(corner: tuple[float, float], other: tuple[float, float], radius: float = 7) -> str:
    x, y = (c + max(-radius, min(radius, o - c)) for c, o in zip(corner, other, strict=True))
    return f"{x:g} {y:g}"


def plus(x: float, y: float) -> str:
    """A sum of what arrives."""
    return (
        f'<circle class="sum" cx="{x:g}" cy="{y:g}" r="10"/>\n'
        f'<path class="line stream" d="M{x - 5:g} {y:g} H{x + 5:g} M{x:g} {y - 5:g} V{y + 5:g}"/>'
    )


def stop(x: float, y: float) -> str:
    """The mark of a line that no gradient passes."""
    return (
        f'<path class="stop" d="M{x - 3:g} {y - 9:g} V{y + 9:g} M{x + 3:g} {y - 9:g} V{y + 9:g}"/>'
    )


def inline() -> list[str]:
    """The left panel: tuners beside the operations of a block."""
    x, mha, ffn, joint = 205, 322, 222, 124
    parts = [
        '<rect class="panel" x="12" y="12" width="382" height="416" rx="8"/>',
        text(28, 38, "Res-Tuning", "title"),
        text(28, 58, '<tspan class="i b">x′ = OP(x) + tuner(x)</tspan>', "start quiet"),
        f'<rect class="frame" x="{x - 72}" y="158" width="144" height="218" rx="8"/>',
        text(x - 64, 355, "frozen", "start quiet"),
        text(x - 64, 369, "block", "start quiet"),
        text(x, 420, "stream x", "quiet"),
        arrow("stream", (x, 406), (x, mha + 17)),
        arrow("stream", (x, mha - 17), (x, mha - 38)),
        arrow("stream", (x, mha - 58), (x, ffn + 17)),
        arrow("stream", (x, ffn - 17), (x, ffn - 38)),
        arrow("stream", (x, ffn - 58), (x, joint + 10)),
        arrow("stream", (x, joint - 10), (x, 84)),
        text(x, 77, "next stream x′", "quiet"),
        arrow("delta", (x, 392), (74, 392), (74, 259)),
        arrow("delta", (74, 225), (74, joint), (x - 10, joint)),
        box(74, 242, 88, "tuner", "trained"),
        text(74, joint - 10, "beside the block", "quiet"),
    ]
    for y, name, split in ((mha, "MHA", 358), (ffn, "FFN", 255)):
        parts += [
            arrow("delta", (x, split), (332, split), (332, y + 17)),
            arrow("delta", (332, y - 17), (332, y - 48), (x + 10, y - 48)),
            box(x, y, 100, name, "frozen"),
            box(332, y, 88, "tuner", "trained"),
            plus(x, y - 48),
        ]
    return [*parts, plus(x, joint)]


def bypass() -> list[str]:
    """The right panel: the detached side network."""
    trunk, side, across = 466, 706, 616
    rows = {"0": 336, "1": 262, "<tspan class='i'>L</tspan>": 152}
    parts = [
        '<rect class="panel" x="406" y="12" width="382" height="416" rx="8"/>',
        text(422, 38, "Res-Tuning-Bypass", "title"),
        text(422, 58, RECURSION, "start quiet"),
        text(trunk, 420, "images", "quiet"),
        arrow("stream", (trunk, 408), (trunk, 389)),
        arrow("stream", (trunk, 355), (trunk, 317)),
        arrow("stream", (trunk, 283), (trunk, 242), head=False),
        arrow("stream", (trunk, 222), (trunk, 207)),
        arrow("stream", (trunk, 173), (trunk, 152), head=False),
        text(trunk, 236, "⋮"),
        box(trunk, 372, 96, "embedding", "frozen"),
        box(trunk, 300, 96, "block 1", "frozen"),
        box(trunk, 190, 96, "block <tspan class='i'>L</tspan>", "frozen"),
    ]
    # Cards behind the first one: the same side network once more for each further task.
    for shift in (16, 8, 0):
        parts.append(
            f'<rect class="card" x="{568 + shift}" y="{92 - shift}" width="190" height="280" rx="8"/>'
        )
    parts += [
        text(671, 396, "one backbone pass,", "quiet"),
        text(671, 412, "a side network for each task", "quiet"),
        text(537, 116, "no", "red"),
        text(537, 130, "gradient", "red"),
    ]
    for name, y in rows.items():
        end = (side - 13, y) if name == "0" else (across - 30, y)
        way = ((trunk, y), (side, y), (side, 319)) if name == "0" else ((trunk, y), end)
        parts += [
            arrow("value", *way),
            stop(537, y),
            f'<circle class="stream-head" cx="{trunk}" cy="{y}" r="3.5"/>',
            text(
                trunk + 20,
                y - 6,
                f"<tspan class='i b'>x</tspan><tspan dy='3' font-size='10'>{name}</tspan>",
            ),
        ]
        if name != "0":
            sub = f"<tspan dy='3' font-size='10'>{name}</tspan>"
            parts += [
                arrow("delta", (across + 30, y), (side - 15, y)),
                box(across, y, 60, f"<tspan class='i'>h</tspan>{sub}", "trained", 30),
                f'<circle class="trained" cx="{side}" cy="{y}" r="15"/>',
                text(side, y + 4, f"<tspan class='i'>λ</tspan>{sub}"),
            ]
    last = "<tspan class='i'>v</tspan><tspan dy='3' font-size='10' class='i'>L</tspan>"
    parts += [
        box(
            side,
            304,
            60,
            "<tspan class='i'>v</tspan><tspan dy='3' font-size='10'>1</tspan>",
            "trained",
            30,
        ),
        arrow("delta", (side, 289), (side, 278)),
        arrow("delta", (side, 247), (side, 242), head=False),
        text(side, 236, "⋮"),
        arrow("delta", (side, 222), (side, 211)),
        box(side, 196, 60, last, "trained", 30),
        arrow("delta", (side, 181), (side, 167)),
        arrow("delta", (side, 137), (side, 127)),
        box(side, 112, 60, "head", "trained", 30),
    ]
    return parts


def legend() -> list[str]:
    """What the colours and lines say."""
    y = 452
    return [
        f'<rect class="frozen" x="28" y="{y - 8}" width="22" height="16" rx="4"/>',
        text(57, y + 4.5, "frozen", "start quiet"),
        f'<rect class="trained" x="124" y="{y - 8}" width="22" height="16" rx="4"/>',
        text(153, y + 4.5, "trained", "start quiet"),
        plus(238, y),
        text(255, y + 4.5, "adds what arrives", "start quiet"),
        arrow("value", (406, y), (440, y)),
        text(448, y + 4.5, "values only, computed once", "start quiet"),
        stop(662, y),
        text(674, y + 4.5, "detached", "start quiet"),
    ]


def drawn() -> str:
    """The whole file."""
    body = "\n".join([*inline(), *bypass(), *legend()])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" role="img" aria-label="{ALT}">\n<style>{STYLE}</style>\n'
        f'<rect class="page" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="10"/>\n'
        f"{body}\n</svg>\n"
    )


if __name__ == "__main__":
    PICTURE.write_text(drawn(), encoding="utf-8")
