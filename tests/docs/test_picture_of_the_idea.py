"""The picture of the idea is what its script draws."""

import runpy
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "docs" / "draw_idea.py"))


def test_the_committed_picture_is_what_the_script_draws():
    assert (ROOT / "docs" / "idea.svg").read_text(encoding="utf-8") == SCRIPT["drawn"]()


def test_the_picture_is_sound_xml_and_everything_in_it_lies_on_its_page():
    picture = ElementTree.fromstring(SCRIPT["drawn"]())  # noqa: S314
    assert picture.get("aria-label")
    for shape in picture.iter():
        across = [float(shape.get(n, 0)) for n in ("x", "width", "cx", "r")]
        down = [float(shape.get(n, 0)) for n in ("y", "height", "cy", "r")]
        assert sum(across) <= SCRIPT["WIDTH"] and sum(down) <= SCRIPT["HEIGHT"]
