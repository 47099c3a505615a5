"""Pages of results are what the committed results say."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ABLATIONS = runpy.run_path(str(ROOT / "recipes" / "ablations" / "page.py"))
BEYOND = runpy.run_path(str(ROOT / "recipes" / "beyond.py"))
PAPER = runpy.run_path(str(ROOT / "recipes" / "paper" / "claims.py"))
SHARED = runpy.run_path(str(ROOT / "recipes" / "shared_tasks" / "page.py"))


@pytest.mark.parametrize(("drawn", "page"), [(ABLATIONS, "ablations.md"), (BEYOND, "beyond.md")])
def test_a_page_is_drawn_from_the_results(drawn, page):
    assert drawn["page"]() == (ROOT / "docs" / page).read_text(encoding="utf-8")


def blanked(text):
    """A page without its tables, each of which must be drawn again."""
    blank = re.sub(r"(<!-- ([\w ]+) -->\n).*?(<!-- end of \2 -->)", r"\1\3", text, flags=re.DOTALL)
    assert blank != text
    return blank


def test_the_tables_of_the_shared_tasks_are_drawn_from_the_results():
    text = SHARED["PAGE"].read_text(encoding="utf-8")
    assert SHARED["drawn"](blanked(text)) == text


def test_the_tables_of_the_paper_s_claims_are_drawn_from_the_results():
    text = PAPER["PAGE"].read_text(encoding="utf-8")
    assert PAPER["drawn"](blanked(text)) == text


def test_a_claim_is_held_missed_in_part_or_not_shown_and_its_section_is_there():
    text = PAPER["PAGE"].read_text(encoding="utf-8")
    sections = {
        re.sub(r"[^\w -]", "", line[3:]).lower().replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("## ")
    }
    for claim, _, _, _, verdict in PAPER["claims"]():
        assert claim[claim.index("#") + 1 : -1] in sections, claim
        assert verdict.partition(":")[0] in ("held", "held in part", "MISSED", "not shown"), claim


def test_no_figure_of_ours_is_typed_into_the_page_of_the_paper_s_claims():
    text = re.sub(r"```.*?```", "", PAPER["PAGE"].read_text(encoding="utf-8"), flags=re.S)
    for mark in PAPER["TABLES"]:
        text = re.sub(f"<!-- {mark} -->.*<!-- end of {mark} -->", "", text, flags=re.S)
    assert "| --- |" not in text
    # Versions, links and names of models aside, a result has a decimal point.
    text = re.sub(r"`[^`]*`|arXiv 2310\.19859|\]\([^)]*\)|v1\.5", "", text)
    assert re.findall(r"\d+\.\d+", text) == []


def test_every_command_of_the_paper_s_own_settings_parses():
    text = PAPER["PAGE"].read_text(encoding="utf-8")
    commands = re.findall(r"^python (recipes/\S+)(.*)$", text, re.M)
    assert {name for name, _ in commands} == {"recipes/paper/suites.py", "recipes/coco2017.py"}
    for name, arguments in commands:
        read = runpy.run_path(str(ROOT / name))["read_arguments"]
        assert read(shlex.split(arguments))


def test_the_table_of_calibration_says_what_the_recipe_measured():
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    found = json.loads((ROOT / "recipes" / "calibration.json").read_text(encoding="utf-8"))

    def cells(method, plain, with_it):
        one, other = found["means"][method][plain], found["means"][method][with_it]
        shares = f"{100 * one['ece']:.1f} % | {100 * other['ece']:.1f} %"
        return f" | {shares} | {one['nll']:.2f} | {other['nll']:.2f} |"

    for method in found["means"]:
        rows = [line for line in text.splitlines() if line.startswith(f"| `{method}`")]
        assert any(row.endswith(cells(method, "as it is", "fitted")) for row in rows), method
        if method != "ridge":
            both = cells(method, "on both, as it is", "on both, fitted before")
            assert any(row.endswith(both) for row in rows), method
    (auto,) = (row for row in found["auto"] if row["task"] == "cifar100")
    assert f"from {100 * auto['ece_uncalibrated']:.1f} to {100 * auto['ece']:.1f} %" in text


def test_the_tables_of_billions_of_parameters_are_drawn_from_the_forecast(monkeypatch):
    folder = ROOT / "benchmarks"
    others = sys.modules.pop("common", None)
    monkeypatch.syspath_prepend(str(folder))
    billions = runpy.run_path(str(folder / "billions.py"))
    del sys.modules["common"]
    if others is not None:
        sys.modules["common"] = others
    rows = json.loads((folder / "results" / "billions-cpu.json").read_text(encoding="utf-8"))[
        "rows"
    ]
    text = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    assert billions["drawn"](text, rows) == text and billions["BEGIN"] in text


def test_every_result_belongs_to_an_ablation():
    folders = {p.parent.name for p in (ROOT / "recipes" / "ablations").glob("*/grid.json")}
    assert folders and folders <= set(ABLATIONS["ABLATIONS"])
