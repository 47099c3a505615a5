"""The Python of docs/text.md runs as it stands, on small models under the names it uses."""

import csv
import json
import re
from pathlib import Path

import torch

from zoo import folders


def test_the_text_tutorial_runs_and_does_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "text.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.S))
    encoder, decoder = folders.bert(tmp_path / "encoder"), folders.gpt2(tmp_path / "decoder")
    code = code.replace("hf:sentence-transformers/all-MiniLM-L6-v2", f"hf:{encoder}")
    code = code.replace('"gpt2"', repr(str(decoder)))
    rows = [
        (f"a {word} film" + " very" * (i % 3), word) for i in range(20) for word in ("good", "bad")
    ]
    with (tmp_path / "reviews.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("review", "verdict"), *rows])
    names: dict = {}
    exec(compile(code, "text.md", "exec"), names)  # noqa: S102
    assert names["logits"].shape == (4, 2)
    assert names["per_token"].shape == (*names["inputs"]["input_ids"].shape, 9)
    assert torch.equal(names["padded"].mask, names["inputs"]["attention_mask"].bool())
    assert names["tokens"].shape[1] > names["prompt"]["input_ids"].shape[1]
    assert all(p.grad is None for p in names["model"].parameters())


def test_the_table_of_detached_methods_is_drawn_from_the_committed_result():
    import text_detached

    page = text_detached.PAGE.read_text()
    shown = page.split(text_detached.MARKS[0])[1].split(text_detached.MARKS[1])[0]
    rows = json.loads(text_detached.FILE.read_text())["rows"]
    assert shown.strip().splitlines() == text_detached.draw_table(rows)
