"""The example of Ray Tune in the docs runs, where Ray is installed."""

import re
from pathlib import Path

import pytest

import restuning

PAGE = Path(__file__).parents[2] / "docs" / "control.md"


@pytest.mark.longer
def test_the_page_searches_with_ray_tune(tmp_path, monkeypatch, capsys):
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.tune")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```py\n(.*?)```", PAGE.read_text(), re.S)
    ray.init(num_cpus=1, include_dashboard=False)
    try:
        exec(compile(code, "control.md", "exec"), {"restuning": restuning})  # noqa: S102
    finally:
        ray.shutdown()
    assert "'lr'" in capsys.readouterr().out
