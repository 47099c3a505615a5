"""The Python of docs/diffusion.md runs as it stands, on a small pipeline under the name it uses."""

import re
from pathlib import Path

import pytest
import torch

from diffusion.small import stable_diffusion

pytest.importorskip("diffusers")


def test_the_page_on_diffusion_runs_and_does_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "diffusion.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.S))
    (tmp_path / "words").mkdir()
    stable_diffusion(tmp_path / "words").save_pretrained(tmp_path / "stable-diffusion-v1-5")
    names: dict = {}
    exec(compile(code, "diffusion.md", "exec"), names)  # noqa: S102
    assert names["predictions"].shape == (3, 2, 4, 32, 32)
    # Fresh tasks: what the pipeline itself predicts.
    assert (names["base"] - names["first"]).abs().max() < 2e-5
    assert names["result"]["steps"] == 2 and set(names["result"]["loss"]) == {"balloon", "barn"}
    assert (tmp_path / "runs" / "flowers" / "barn.task" / "task.json").is_file()
    assert not torch.equal(names["first"], torch.zeros_like(names["first"]))
