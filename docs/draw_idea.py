"""Draw `docs/idea.png`, the README's figure: python docs/draw_idea.py."""

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

FROZEN, TUNED, STATE = "#dfe5ec", "#f3b36b", "#9ccfa4"


def box(axis, x, y, text, colour, width=1.25):
    """A named box."""
    axis.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - 0.27),
            width,
            0.54,
            boxstyle="round,pad=0.04",
            facecolor=colour,
            edgecolor="#444444",
            linewidth=0.9,
        )
    )
    axis.text(x, y, text, ha="center", va="center", fontsize=9)


def arrow(axis, start, end, colour="#444444", bend=0.0, style="-"):
    """An arrow between two points."""
    axis.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=11,
            color=colour,
            linestyle=style,
            connectionstyle=f"arc3,rad={bend}",
            linewidth=1.3,
        )
    )


def main() -> None:
    """Two panels: tuners inside the forward, and the detached bypass."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), constrained_layout=True)
    left.set_title("Res-Tuning: x' = OP(x) + tuner(x)", fontsize=11)
    for y, name in ((1, "MHA"), (3, "FFN")):
        box(left, 1, y, f"norm, {name}", FROZEN)
        box(left, 3.2, y, "tuner, scale", TUNED)
        arrow(left, (1, y - 0.95), (1, y - 0.32))
        arrow(left, (1, y - 0.8), (3.2, y - 0.32), "#c46f12")
        arrow(left, (1, y + 0.32), (1, y + 0.95))
        arrow(left, (3.2, y + 0.32), (1.15, y + 0.85), "#c46f12")
        left.text(0.78, y + 0.85, "+", fontsize=15, ha="center", va="center")
    left.text(1, -0.15, "stream x (before the norm)", ha="center", fontsize=9)
    left.text(1, 4.2, "next stream", ha="center", fontsize=9)
    left.text(
        3.2,
        4.2,
        "gradient flows through\nthe frozen layers",
        ha="center",
        fontsize=8.5,
        color="#c46f12",
    )
    right.set_title("Res-Tuning-Bypass: no gradient enters the backbone", fontsize=11)
    for layer, y in ((1, 1), (2, 2.5)):
        box(right, 0.6, y, f"layer {layer}", FROZEN)
        box(right, 2.6, y, f"h{layer}", TUNED, 0.7)
        box(right, 4.6, y, f"λ{layer}", STATE, 0.7)
        box(right, 4.6, y - 0.75, f"v{layer}", TUNED, 0.7)
        arrow(right, (1.3, y), (2.2, y), "#777777", style="--")
        arrow(right, (3.0, y), (4.2, y))
        arrow(right, (0.6, y - 0.95), (0.6, y - 0.32))
        arrow(right, (4.6, y - 0.45), (4.6, y - 0.32))
    arrow(right, (4.6, 1.3), (4.6, 1.45))
    arrow(right, (0.6, -0.1), (4.2, 0.2), "#777777", style="--")
    arrow(right, (4.6, 2.8), (4.6, 3.35))
    box(right, 4.6, 3.65, "frozen norm, head", FROZEN, 1.7)
    right.text(0.6, -0.3, "x0", ha="center", fontsize=9)
    right.text(
        1.75,
        3.55,
        "dashed: values only, computed once\nfor any number of tasks",
        ha="center",
        fontsize=8.5,
        color="#555555",
    )
    for axis, width in ((left, 4.3), (right, 5.7)):
        axis.set_xlim(-0.3, width)
        axis.set_ylim(-0.6, 4.6)
        axis.axis("off")
    figure.savefig(Path(__file__).with_name("idea.png"), dpi=120)


if __name__ == "__main__":
    main()
