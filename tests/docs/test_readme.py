"""The README's Python runs as it stands."""

import re
from pathlib import Path


def test_the_readme_code_runs_and_is_about_what_it_documents(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102
    assert (tmp_path / "runs" / "example" / "digits.task" / "task.json").exists()
    assert set(names["answers"]) == {"a", "b"}
