"""Pages of the site that are not files in `docs/`: a hook of mkdocs, named in `mkdocs.yml`.

Two kinds: texts that stand elsewhere in the repository because that is where a reader of it looks
(README, DESIGN, the recipes), and the reference, one page for each room of the package, made of the
names that the room's `__init__` gives. A name that a room gives is documented without a line here.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "restuning"

ELSEWHERE = {
    "index.md": "README.md",
    "design.md": "DESIGN.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "shared_tasks.md": "recipes/shared_tasks/README.md",
    "image_generation.md": "recipes/image_generation/README.md",
    "pretrain_tiny.md": "recipes/pretrain_tiny/README.md",
}
"""Page of the site: the file of the repository that it shows."""

GROUPS = {
    "Training and answering": ("search", "serve", "training", "integrations", "forecast"),
    "Models and data": ("backbones", "data", "features", "methods"),
    "The core": ("task", "problems", "host", "bypass", "tuners", "sites"),
    "More": ("diffusion", "bench"),
}
"""How the menu groups the rooms; one that is not named here stands in the last group."""

UNLISTED = {"cli"}
"""Rooms whose face is not Python: the commands document themselves (`restuning --help`)."""


def rooms() -> list[str]:
    """The rooms of the package that have a page, by name."""
    inits = PACKAGE.glob("*/__init__.py")
    return sorted(p.parent.name for p in inits if p.parent.name not in UNLISTED)


def names_given_by(init: Path) -> dict[str, str]:
    """Public names that an `__init__` imports, classes first, and the module each comes from."""
    tree = ast.parse(init.read_text(encoding="utf-8"))
    found = {
        alias.name: node.module or ""
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name and not alias.name.startswith("_")
    }
    return {name: found[name] for name in sorted(found, key=_classes_first)}


def _classes_first(name: str) -> tuple[bool, str]:
    return not name[0].isupper() or name.isupper(), name.lower()


def summary_of(room: str) -> str:
    """What a room's `__init__` says it is."""
    tree = ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8"))
    return ast.get_docstring(tree) or ""


def entries_of(room: str) -> dict[str, str]:
    """What the page of a room documents, in order: name and full path.

    First what only the package's own face gives of it (`restuning.train`, whose room cannot give it:
    the file has the same name), then what the room gives.
    """
    own = {n: f"restuning.{room}.{n}" for n in names_given_by(PACKAGE / room / "__init__.py")}
    face = names_given_by(PACKAGE / "__init__.py")
    more = {
        name: f"{module}.{name}"
        for name, module in face.items()
        if module.startswith(f"restuning.{room}.") and name not in own
    }
    return {**more, **own}


def reference_of(room: str) -> str:
    """The page of one room."""
    entries = "\n\n".join(f"::: {path}" for path in entries_of(room).values())
    return f"# restuning.{room}\n\n{summary_of(room)}\n\n{entries}\n"


def errors() -> str:
    """The page of the exceptions, which no room gives: all derive from `RestuningError`."""
    tree = ast.parse((PACKAGE / "_errors.py").read_text(encoding="utf-8"))
    names = [each.name for each in tree.body if isinstance(each, ast.ClassDef)]
    entries = "\n\n".join(f"::: restuning._errors.{name}" for name in names)
    return f"# Errors\n\n{ast.get_docstring(tree)}\n\n{entries}\n"


def reference() -> str:
    """The first page of the reference: what `restuning` itself gives, and the rooms."""
    rows = "\n".join(
        f"| [`restuning.{room}`]({room}.md) | {summary_of(room).splitlines()[0]} |"
        for room in _rooms_in_order()
    )
    return (
        "# Reference\n\nOne page for each room of the package, made from its docstrings.\n\n"
        f"| room | what it holds |\n|---|---|\n{rows}\n\n## What `restuning` gives by itself\n\n"
        "The names that most programs need, as in `from restuning import Host, Tuned, train`:\n\n"
        f"{', '.join(_short_names())}.\n"
    )


def _short_names() -> Iterator[str]:
    """Names of the package's own face, each with a link to its entry."""
    for name, module in names_given_by(PACKAGE / "__init__.py").items():
        room = module.removeprefix("restuning").lstrip(".").partition(".")[0]
        if room in rooms() and name in (entries := entries_of(room)):
            yield f"[`{name}`]({room}.md#{entries[name]})"
        elif room == "_errors":
            yield f"[`{name}`](errors.md#restuning._errors.{name})"
        else:
            yield f"`{name}`"


def _rooms_in_order() -> list[str]:
    named = [room for group in GROUPS.values() for room in group]
    return [r for r in named if r in rooms()] + [r for r in rooms() if r not in named]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the rooms into the menu."""
    place = next(each for each in config.nav or [] if "Reference" in each)
    menu: list[Any] = ["api/index.md"]
    last = list(GROUPS)[-1]
    for title, group in GROUPS.items():
        more = [r for r in _rooms_in_order() if not any(r in g for g in GROUPS.values())]
        wanted = [r for r in group if r in rooms()] + (more if title == last else [])
        menu.append({title: [{room: f"api/{room}.md"} for room in wanted]})
    place["Reference"] = [*menu, {"Errors": "api/errors.md"}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in `docs/`."""
    for page, source in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for room in rooms():
        files.append(File.generated(config, f"api/{room}.md", content=reference_of(room)))
    files.append(File.generated(config, "api/errors.md", content=errors()))
    files.append(File.generated(config, "api/index.md", content=reference()))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    here = ELSEWHERE.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    # Markdown inside <details> is read by a browser's own rules unless the tag says otherwise.
    markdown = markdown.replace(" ± ", "\u00a0±\u00a0")  # a figure and its spread stay on one line
    markdown = markdown.replace("<details>", '<details markdown="1">')
    return re.sub(
        r"\]\((?!https?:|mailto:|#)([^)#\s]+)",
        lambda m: f"]({_page_of(m[1], here, page.file.src_uri)}",
        markdown,
    )


def _page_of(target: str, here: str, page: str) -> str:
    """Where a link from a file of the repository leads on the site."""
    file = (ROOT / here).parent.joinpath(target).resolve()
    if not file.is_relative_to(ROOT):
        return target
    inside = file.relative_to(ROOT).as_posix()
    shown = {source: name for name, source in ELSEWHERE.items()}
    wanted = shown.get(inside, inside.removeprefix("docs/"))
    return "/".join([*[".."] * page.count("/"), wanted])
