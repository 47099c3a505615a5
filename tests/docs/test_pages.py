"""The Python of the README and of the docs runs as it stands."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ELSEWHERE = {"text", "audio", "clip", "diffusion", "serving", "hub"}
"""Pages on backbones of a hub, or that need a server: `test_text.py`, `test_audio_page.py` and so on run them."""
LONG = {"bench", "choosing", "control", "deploying", "engines", "trainer"}
"""Pages whose code trains many times, or exports."""
PAGES = [
    p
    for p in sorted((ROOT / "docs").glob("*.md"))
    if "```python" in p.read_text() and p.stem not in ELSEWHERE
]


def run(page):
    """All blocks of a page, in one session."""
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        exec(compile(code, page.name, "exec"), names)  # noqa: S102
    return names


def test_the_readme_code_runs_and_is_about_what_it_documents(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run(ROOT / "README.md")
    assert (tmp_path / "runs" / "example" / "digits.task" / "task.json").exists()
    assert set(names["answers"]) == {"digits", "again"}


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=pytest.mark.slow if p.stem in LONG else ()) for p in PAGES],
    ids=lambda p: p.stem,
)
def test_the_code_of_a_page_of_the_docs_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(page)


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.stem
)
def test_what_a_page_points_to_is_there(page):
    for target in re.findall(r"\]\((?!http|#|mailto)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


TEXTS = [
    ROOT / "README.md",
    ROOT / "DESIGN.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("**/*.md")),
]


@pytest.mark.parametrize("page", TEXTS, ids=lambda p: p.stem)
def test_files_of_the_repository_that_a_page_names_are_there(page):
    places = (ROOT, ROOT / "src" / "restuning", page.parent)
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    named = set(re.findall(r"`((?:[\w.-]+/)+[\w.-]*\.(?:py|md|toml|jsonl?))(?=[`:,])", text))
    made = {"runs", "grid", "choice", "photos", "work"}
    for name in named:
        if "NAME" in name or name.partition("/")[0] in made:
            continue
        assert any((place / name).exists() for place in places), name
