"""Examples run a backbone at its own image size; who asks for a smaller one says so, with what it costs."""

import re
import statistics
from pathlib import Path

import pytest

from restuning.bench import read_results
from restuning.bench.folder import read_grid
from restuning.bench.report import summarise, words
from restuning.cli.app import COMMANDS, EXAMPLES, load_command
from restuning.training.own_size import MEASURED

ROOT = Path(__file__).parents[2]
ASKS = re.compile(
    # Of `NAME@160` and `PIXELS`, which explain how to ask, none is a size of a model; `_224@224` is its own.
    r"--(?:image-)?size[ =]\d+|timm:(?!NAME|\w+_(\d+)@\1\b)[\w.]+@\d+|\bat 112 px|\bSIZE = 112"
)
"""What asks for an image size, and what says that figures are at a smaller one."""

STATED = "smaller than the backbone's own"
ABLATIONS = {
    "README.md": "the table of the shared tasks",
    "docs/backbones.md": "of `recipes/cnn.py`",
    "docs/beyond.md": "its JSON of robustness is at 112 px",
    "docs/choosing.md": "the table of the shared tasks",
    "docs/draw_backbones.py": "draws that of `recipes/cnn.py`",
    "docs/engines.md": "of `recipes/int8.py`",
    "docs/images.md": "what a smaller size costs",
    "docs/mixing.md": "how it was chosen",
    "docs/tutorial.md": "the table of `recipes/calibration.py`",
    "docs/paper_recipes.md": "of `recipes/paper`",
    "recipes/beyond.py": "its JSON of robustness is at 112 px",
    "recipes/calibration.py": "its JSON is at 112 px",
    "recipes/cnn.py": "its JSON is at 112 px",
    "recipes/int8.py": "its JSON is at 112 px",
    "recipes/paper/common.py": "the JSON of the recipes beside it is at 112 px",
    "recipes/shared_tasks/README.md": "its JSON is at 112 px",
    "recipes/shared_tasks/going_on.py": "its JSON is at 112 px",
}
"""Files that may ask for a smaller size, and why; each says that it is one."""

BESIDE_COMMON = {"bypass", "prefix_unbound", "prompt_and_adapter", "start"}
"""Recipes of the paper, which name the size that `common.py` sets."""


def asking():
    """Files that ask for an image size or have figures at a smaller one."""
    texts = [ROOT / "README.md", ROOT / "DESIGN.md", ROOT / "CONTRIBUTING.md"]
    for folder in ("docs", "recipes", "benchmarks"):
        texts += [p for p in (ROOT / folder).rglob("*") if p.suffix in (".md", ".py")]
    return {
        path.relative_to(ROOT).as_posix()
        for path in texts
        if ASKS.search(path.read_text(encoding="utf-8")) and path.stem not in BESIDE_COMMON
    }


def test_only_stated_ablations_ask_for_an_image_size():
    assert asking() - ABLATIONS.keys() == set()


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_says_that_its_size_is_smaller(name):
    text = re.sub(r"[\s\"]+", " ", (ROOT / name).read_text(encoding="utf-8"))
    assert STATED in text
    # What asks for none any more is no ablation, and leaves the list.
    assert name in asking() or name == "recipes/int8.py"


def test_no_help_asks_for_an_image_size():
    lines = list(EXAMPLES)
    for name in COMMANDS:
        made = load_command(name)
        for each in list(getattr(made, "commands", {}).values()) or [made]:
            lines += each.examples
    assert [line for line in lines if ASKS.search(line)] == []


def test_no_text_of_the_library_asks_for_one():
    assert [
        path.name
        for path in (ROOT / "src").rglob("*.py")
        if re.search(r"--image-size \d", path.read_text(encoding="utf-8"))
    ] == []


@pytest.mark.parametrize("pixels", MEASURED)
def test_the_figures_of_the_sentence_and_of_its_page_are_those_of_the_results(pixels):
    folder = ROOT / "recipes" / "shared_tasks" / "own_size" / f"px_{pixels}"
    finals = [r for r in read_results(folder) if r["stage"] == "final"]
    assert len(finals) == 3 and {r["method"] for r in finals} == {"linear"}
    name = finals[0]["backbone"]["name"]
    assert name == "timm:vit_tiny_patch16_224" + ("" if pixels == 224 else f"@{pixels}")
    mean = 100 * statistics.mean(r["accuracy"] for r in finals)
    assert MEASURED[pixels] == round(mean, 1)
    cell = words.format_cell(summarise(folder).cells["cifar100", "linear"])
    page = (ROOT / "docs" / "images.md").read_text(encoding="utf-8")
    assert re.search(rf"\| {pixels} px[^|]* \| {cell} \|", page)


def test_results_at_other_sizes_differ_in_nothing_else():
    def known(pixels):
        grid = read_grid(ROOT / "recipes" / "shared_tasks" / "own_size" / f"px_{pixels}")
        return {**grid["protocol"], "backbone": None}, grid["choices"]

    assert known(112) == known(224)
