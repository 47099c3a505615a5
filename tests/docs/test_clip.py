"""The Python of docs/clip.md runs as it stands, on a small model under the name it uses."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
import towers  # noqa: E402 (needs transformers)


def test_the_page_on_vision_language_models_runs_and_does_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "clip.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.S))
    towers.saved(towers.clip(), tmp_path / "small")
    assert code.count("openai/clip-vit-base-patch32") == 2
    code = code.replace("openai/clip-vit-base-patch32", "small")
    names: dict = {}
    exec(compile(code, "clip.md", "exec"), names)  # noqa: S102
    assert torch.allclose(names["a"].norm(dim=-1), torch.ones(4), atol=1e-5)
    for task in (names["seeing"], names["reading"]):
        assert any(p.abs().max() > 0 for n, p in task.named_parameters() if n.endswith("up.weight"))
    assert all(p.grad is None for p in names["backbone"].text.parameters())
    assert names["output"].logits_per_image.shape == (4, 4)
