"""The page of PEFT's own tests is what the committed result says, and every case that is left out has a reason."""

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]
DRAWN = runpy.run_path(str(ROOT / "docs" / "draw_peft.py"))


def test_the_page_is_drawn_from_the_committed_cases():
    written = (ROOT / "docs" / "peft.md").read_text(encoding="utf-8")
    assert DRAWN["page"](DRAWN["result"]()) == written


def test_no_case_failed_and_none_is_left_out_without_a_reason():
    table = DRAWN["result"]()
    assert sum(row.get("failed", 0) for row in table["tests"].values()) == 0
    assert sum(row.get("passed", 0) for row in table["tests"].values()) > 0
    assert all(why for row in table["tests"].values() for why in row.get("not applicable", {}))
    assert all(row["reason"] for row in table["files"].values())


def test_every_rule_that_leaves_a_case_out_is_used():
    table = DRAWN["result"]()
    used = {why for row in table["tests"].values() for why in row.get("not applicable", {})}
    assert {rule["reason"] for rule in table["not applicable"]} <= used
    for rule in table["files not run"]:
        assert any(re.fullmatch(rule["pattern"], name) for name in table["files"]), rule
    for pattern in table["names alone"]:
        assert any(re.search(pattern, name) for name in table["tests"]), pattern
