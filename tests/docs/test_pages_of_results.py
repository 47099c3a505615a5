"""Pages of results are what the committed results say."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ABLATIONS = runpy.run_path(str(ROOT / "recipes" / "ablations" / "page.py"))
BEYOND = runpy.run_path(str(ROOT / "recipes" / "beyond.py"))
SHARED = runpy.run_path(str(ROOT / "recipes" / "shared_tasks" / "page.py"))


@pytest.mark.parametrize(("drawn", "page"), [(ABLATIONS, "ablations.md"), (BEYOND, "beyond.md")])
def test_a_page_is_drawn_from_the_results(drawn, page):
    assert drawn["page"]() == (ROOT / "docs" / page).read_text(encoding="utf-8")


def test_the_tables_of_the_shared_tasks_are_drawn_from_the_results():
    text = SHARED["PAGE"].read_text(encoding="utf-8")
    assert SHARED["drawn"](text) == text


def test_every_result_belongs_to_an_ablation():
    folders = {p.parent.name for p in (ROOT / "recipes" / "ablations").glob("*/grid.json")}
    assert folders and folders <= set(ABLATIONS["ABLATIONS"])
