"""The session of the page on hubs does what it says, against a hub on loopback."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image
from small_hub import at_hub

from commands import restuning

pytest.importorskip("huggingface_hub", reason="needs the extra hub")

PAGE = (Path(__file__).parents[2] / "docs" / "hub.md").read_text()


def test_the_session_of_the_page_runs_in_its_order(tmp_path, monkeypatch):
    Image.new("L", (8, 8), 90).convert("RGB").save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    names, said = {}, {}
    with at_hub(monkeypatch, tmp_path / "cache"):
        for language, block in re.findall(r"```(bash|python)\n(.*?)```", PAGE, re.S):
            if language == "python":
                exec(compile(block, "hub.md", "exec"), names)  # noqa: S102
                continue
            for line in block.splitlines():
                program, *words = shlex.split(line)
                assert program == "restuning"
                done = restuning(*words, COLUMNS="200")
                assert done.returncode == 0, (line, done.stderr)
                said[words[0]] = done.stdout
    assert [*names["both"].tasks] == ["a", "b"] and names["both"].forwards == 1
    assert "someone/digits" in said["ls-hub"] and "someone/zoo (private)" in said["ls-hub"]
    assert re.search(r"someone/zoo/digits@[0-9a-f]", said["info"])
