"""What a report says, and the page it is said on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image

from restuning._visible import make_visible
from restuning.data.thumbnails import SIDE, make_data_uri
from restuning.problems.judged import Breakdown, Confusion, Judged, Pixels, Reliability, Scatter
from restuning.report import drawings
from restuning.report.words import HIDDEN, find_word

MOST_ROWS = 40
"""Outputs up to which the table of each is shown whole; of more, the worst, and all where it is opened."""
MOST_SCATTERS = 6
NOTHING = 5e-7
"""A figure below it is rounding: a constant answer explains nothing."""
LONGEST_TEXT = 400
"""Characters of a text that was answered wrongly."""


@dataclass(frozen=True)
class Curve:
    """Lines over epochs.

    Attributes:
        title: Of what they are.
        lines: Points by name.
        percent: Whether values are read in percent.
    """

    title: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    percent: bool = False


@dataclass(frozen=True)
class Shown:
    """An input as a person is shown it: an image, a text, or neither; and what it is called."""

    input: Image.Image | str | None
    name: str


@dataclass(frozen=True)
class Page:
    """All that a report says.

    Attributes:
        title: Of the page.
        lead: What was trained on what, in a sentence.
        metric: Name of the figure that comes first.
        noun: What outputs stand for, in the plural.
        split: That answers were judged on, in a word.
        judged: What answers are worth; None where nothing was tested.
        facts: What is said beside the first figure, by title.
        curves: How training went.
        worst: The inputs of `judged.worst`, in its order.
        use: Lines to copy, by what they do.
        settings: By name.
        about: Versions and machine, by name.
        notes: Sentences under the figures.
    """

    title: str
    lead: str
    metric: str
    noun: str
    split: str
    judged: Judged | None
    facts: Mapping[str, str]
    curves: Sequence[Curve]
    worst: Sequence[Shown]
    use: Mapping[str, str]
    settings: Mapping[str, Any]
    about: Mapping[str, Any]
    notes: Sequence[str] = ()


def render(page: Page) -> str:
    """The page as HTML: no script, nothing that is fetched, every name escaped."""
    judged = page.judged
    pictures = () if judged is None else judged.pictures
    confusions = [p for p in pictures if isinstance(p, Confusion)]
    return _template().render(
        page=page,
        judged=judged,
        first=_tell_first(page),
        figures=_tell_figures(page),
        curves=[
            {
                "title": c.title,
                "names": list(c.lines),
                "svg": drawings.draw_lines(c.title, c.lines, "epoch", c.percent),
            }
            for c in page.curves
        ],
        breakdown=None
        if judged is None or judged.breakdown is None
        else _tell_breakdown(judged.breakdown, page.noun),
        confusions=[(drawings.draw(each), _tell_pairs(each), each.unit) for each in confusions],
        most_classes=drawings.MOST_CLASSES,
        reliability=[
            svg for p in pictures if isinstance(p, Reliability) and (svg := drawings.draw(p))
        ],
        scatters=[
            (p.name, svg)
            for p in [p for p in pictures if isinstance(p, Scatter)][:MOST_SCATTERS]
            if (svg := drawings.draw(p))
        ],
        pixels=[(p, _tell_pixels(p)) for p in pictures if isinstance(p, Pixels)],
        worst=_tell_worst(page),
    )


@cache
def _template() -> Any:
    text = resources.files("restuning.report").joinpath("template.html").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_make_visible,
    )
    environment.filters["plain"] = tell_value
    return environment.from_string(text)


def _make_visible(value: Any) -> Any:
    """Each value that the template shows, before it is escaped."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return make_visible(value, lines=True)
    return value


def tell_value(value: Any) -> str:
    """A setting or fact as it is read best."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {tell_value(each)}" for name, each in value.items()) or "–"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(tell_value, value)) or "–"
    return str(value)


def tell_figure(value: float | int | None, share: bool) -> str:
    """A figure as it is read: shares in percent."""
    if value is None:
        return "–"
    if share:
        return f"{100 * value:.1f}%"
    if isinstance(value, int):
        return f"{value:,}"
    if abs(value) < NOTHING:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _tell_first(page: Page) -> dict[str, Any] | None:
    """The figure that comes first, and what an answer that is always the same would have."""
    judged = page.judged
    if judged is None or judged.figures.get(page.metric) is None:
        return None
    share = page.metric in judged.shares
    constant = judged.constant.get(page.metric)
    return {
        "name": find_word(page.metric).name,
        "value": tell_figure(judged.figures[page.metric], share),
        "constant": None if constant is None else tell_figure(constant, share),
        "wrong": judged.wrong,
    }


def _tell_figures(page: Page) -> list[dict[str, Any]]:
    judged = page.judged
    if judged is None:
        return []
    rows = []
    # The first one first, then as the problem gives them.
    names = sorted(judged.figures, key=lambda name: name != page.metric)
    for name in names:
        value, word = judged.figures[name], find_word(name)
        if value is None or name in HIDDEN:
            continue
        share = name in judged.shares
        rows.append(
            {
                "name": word.name,
                "meaning": word.meaning,
                "lower": word.lower,
                "value": tell_figure(value, share),
                "constant": tell_figure(judged.constant[name], share)
                if name in judged.constant and name != "ece"
                else None,
            }
        )
    return rows


def _tell_breakdown(given: Breakdown, noun: str) -> dict[str, Any]:
    """Rows of the table of outputs; of many those that are answered worst come first."""
    columns = list(given.columns.items())
    rows = [
        (
            name,
            given.colours[n] if given.colours else None,
            [
                {
                    "text": tell_figure(values[n], title in given.shares),
                    "bar": None
                    if title not in given.shares or values[n] is None
                    else f"{100 * (values[n] or 0):.1f}%",
                }
                for title, values in columns
            ],
        )
        for n, name in enumerate(given.names)
    ]
    shown, note = rows, ""
    if len(rows) > MOST_ROWS:
        by = given.shares[-1] if given.shares else columns[-1][0]
        values = given.columns[by]
        order = sorted(range(len(rows)), key=lambda n: (values[n] is None, values[n] or 0))
        shown = [rows[n] for n in order[:MOST_ROWS]]
        note = f"the {MOST_ROWS} with the lowest {by} of {len(rows):,}"
    return {
        "titles": [title for title, _ in columns],
        "noun": given.noun or noun,
        "rows": shown,
        "all": rows if len(rows) > MOST_ROWS else [],
        "note": note,
    }


def _tell_pairs(confusion: Confusion) -> list[tuple[str, str, str]]:
    return [(y, k, f"{n:,} of {m:,}") for y, k, n, m in confusion.pairs()]


def _tell_pixels(picture: Pixels) -> str:
    return make_data_uri(Image.fromarray(picture.pixels.cpu().numpy()))


def _tell_worst(page: Page) -> dict[str, Any]:
    """Mistakes as pictures, or as rows of a table where inputs are texts or unknown."""
    mistakes = () if page.judged is None else page.judged.worst
    cards, rows = [], []
    for mistake, shown in zip(mistakes, page.worst, strict=False):
        told = {
            "told": mistake.told,
            "truth": mistake.truth,
            "name": shown.name,
            "loss": tell_figure(mistake.loss, share=False),
            "maps": [],
        }
        picture = shown.input if isinstance(shown.input, Image.Image) else None
        maps = [(each.title, each.told, _tell_map(each, picture)) for each in mistake.maps]
        if picture is not None:
            small = max(picture.size) <= 32
            uri = make_data_uri(picture)
            cards.append({**told, "uri": uri, "small": small, "maps": maps})
        elif maps:
            cards.append({**told, "uri": None, "small": False, "maps": maps})
        else:
            text = shown.input if isinstance(shown.input, str) else shown.name
            cut = text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}…"
            rows.append({**told, "text": cut})
    return {"cards": cards, "rows": rows, "maps": any(card["maps"] for card in cards)}


def _tell_map(given: Pixels, picture: Image.Image | None) -> str:
    """In the shape of the picture that it lies on, where there is one; without colours between those of classes."""
    made = Image.fromarray(given.pixels.cpu().numpy())
    wide, high = made.size if picture is None else picture.size
    factor = min(1.0, SIDE / max(wide, high))
    size = max(1, round(factor * wide)), max(1, round(factor * high))
    return make_data_uri(made.resize(size, Image.Resampling.NEAREST), exact=True)
