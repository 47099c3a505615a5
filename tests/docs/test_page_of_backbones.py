"""The table of backbones is what the committed result says, and the result is good enough."""

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]
DRAWN = runpy.run_path(str(ROOT / "docs" / "draw_backbones.py"))
PROMISED = {"timm": 0.95, "transformers": 1.0, "torchvision": 1.0}
"""Shares of the whole zoo that must pass the chain."""


def test_the_page_is_drawn_from_the_result():
    written = (ROOT / "docs" / "backbones.md").read_text(encoding="utf-8")
    versions = re.search(r"\(`([^`]*)`; the run", written)
    assert versions is not None
    assert DRAWN["page"](DRAWN["latest"](), versions[1]) == written


def test_as_many_pass_as_is_promised():
    rows = DRAWN["latest"]()
    for library, share in PROMISED.items():
        mine = [r for r in rows if r["name"].startswith(f"{library}:")]
        assert mine, library
        assert sum(r["ok"] for r in mine) >= share * len(mine)


def test_what_does_not_pass_has_a_reason():
    assert all(r["ok"] or (r["link"] and r["reason"]) for r in DRAWN["latest"]())
