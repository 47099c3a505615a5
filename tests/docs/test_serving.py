"""The commands of the page on serving do what it says, against a server of the tasks that it names."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from restuning import load_backbone, serve
from restuning.problems import Segmentation
from serving import picture, running, save_task
from zoo import folders

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
HERE = "http://127.0.0.1:8000"
TOKEN = "0123456789abcdef"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with all that the page names, and the address of a server of it."""
    folder = tmp_path_factory.mktemp("page")
    tiny, bert = (
        load_backbone("restuning-tiny"),
        load_backbone(f"hf:{folders.bert(folder / 'bert')}"),
    )
    host = tiny.host()
    tasks = {n: save_task(tiny, folder / f"{n}.task", host=host) for n in ("pets", "scenes")}
    tasks["reviews"] = save_task(bert, folder / "reviews.task", pool="mean")
    whole = replace(tiny, preprocessing=tiny.preprocessing.whole())
    more = {"host": host, "pool": "grid", "problem": Segmentation(window=(24, 24))}
    tasks["fields"] = save_task(whole, folder / "fields.task", **more)
    (folder / "token.txt").write_text(TOKEN)
    for name in ("photo.jpg", "other.jpg", "aerial.png"):
        (folder / name).write_bytes(picture(form="JPEG"))
    with running(serve.app(tasks, admin_token=folder / "token.txt")) as address:
        yield folder, address


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_every_command_of_the_page_answers(world):
    folder, address = world
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", "").splitlines()]
    assert len(lines) >= 12
    for line in lines:
        command = line.replace("curl -s", "curl -sS --fail-with-body").replace(HERE, address)
        done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, (line, done.stdout, done.stderr)
        if "DELETE" not in line:
            json.loads(done.stdout)


def test_the_python_of_the_page_answers(world, monkeypatch, capsys):
    folder, address = world
    monkeypatch.chdir(folder)
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.S):
        exec(compile(code.replace(HERE, address), "serving.md", "exec"), {})  # noqa: S102
    label, probability = capsys.readouterr().out.split()
    assert label in ("ant", "bee", "cat") and 0 < float(probability) <= 1
