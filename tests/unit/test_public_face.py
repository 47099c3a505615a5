"""The names of the package: given lazily, and the same to a type checker as to Python."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import restuning

FACE = Path(restuning.__file__).read_text()


def test_a_type_checker_is_told_the_names_that_python_gives():
    block = next(node for node in ast.parse(FACE).body if isinstance(node, ast.If))
    told = {
        (node.module, alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    given = {(f"restuning.{room}", name) for name, room in restuning._HOMES.items()}
    assert told - {("restuning", "methods")} == given


@pytest.mark.parametrize("name", restuning.__all__)
def test_every_public_name_is_there(name):
    assert getattr(restuning, name) is not None
    assert name in dir(restuning)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'resTuning'"):
        restuning.resTuning  # noqa: B018


def test_importing_the_package_alone_does_not_import_torch():
    code = "import sys, restuning; print(restuning.__version__, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [restuning.__version__, "False"]


def test_a_star_import_gives_all_names():
    names: dict = {}
    exec("from restuning import *", names)  # noqa: S102
    assert set(restuning.__all__) <= set(names)
