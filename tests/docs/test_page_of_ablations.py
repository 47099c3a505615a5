"""The page of ablations is what the committed results say."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]
DRAWN = runpy.run_path(str(ROOT / "recipes" / "ablations" / "page.py"))


def test_the_page_is_drawn_from_the_results():
    assert DRAWN["page"]() == (ROOT / "docs" / "ablations.md").read_text(encoding="utf-8")


def test_every_result_belongs_to_an_ablation():
    folders = {p.parent.name for p in (ROOT / "recipes" / "ablations").glob("*/grid.json")}
    assert folders and folders <= set(DRAWN["ABLATIONS"])
