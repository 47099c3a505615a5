"""The version is the same wherever it stands, and the types of the package are there for others."""

import re
from pathlib import Path

import restuning

ROOT = Path(__file__).parents[2]


def test_the_version_is_the_same_wherever_it_stands():
    for name, pattern in (
        ("pyproject.toml", r'^version = "(.*)"'),
        ("CITATION.cff", r"^version: (.*)"),
    ):
        found = re.search(pattern, (ROOT / name).read_text(encoding="utf-8"), re.M)
        assert found is not None and found[1] == restuning.__version__, name


def test_the_package_says_that_it_has_types():
    assert (Path(restuning.__file__).parent / "py.typed").is_file()
