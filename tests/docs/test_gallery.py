"""The programs of the gallery run as they stand, and print what their pages say they print."""

import re
from pathlib import Path

import pytest

GALLERY = Path(__file__).parents[2] / "docs" / "gallery"
PAGES = sorted(p for p in GALLERY.glob("*.md") if p.stem != "index")
LONG = {"many_tasks"}
"""It trains three tasks: CI runs it, the README's `pytest` does not."""
GUESSING = {"own_images": 0.34, "many_tasks": 0.34, "text_table": 0.5}
"""Accuracy of an answer without looking, the best of a page's tasks: what is printed is well above."""
FIGURE = re.compile(r"\d+\.\d+|\b\d{2,}\b")
"""Digits depend on the processor; words, and how many lines there are, do not."""


def told(page):
    """What the page says is printed."""
    return re.findall(r"```text\n(.*?)```", page.read_text(encoding="utf-8"), re.S)


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=pytest.mark.slow if p.stem in LONG else ()) for p in PAGES],
    ids=lambda p: p.stem,
)
def test_a_program_of_the_gallery_runs_and_prints_what_its_page_says(
    page, tmp_path, monkeypatch, capsys
):
    if page.stem == "text_table":
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
        exec(compile(code, page.name, "exec"), names)  # noqa: S102
    printed = capsys.readouterr().out
    assert FIGURE.sub("#", printed).split() == FIGURE.sub("#", "".join(told(page))).split()
    accuracies = [float(each) / 100 for each in re.findall(r"([\d.]+) %", printed)]
    assert accuracies and max(accuracies) > 1.5 * GUESSING[page.stem]


def test_the_first_page_of_the_gallery_names_every_program():
    links = re.findall(r"\]\((\w+\.md)\)", (GALLERY / "index.md").read_text(encoding="utf-8"))
    assert sorted(links) == [p.name for p in PAGES]
