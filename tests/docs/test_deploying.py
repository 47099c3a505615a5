"""What the page on deploying has beside its Python: a Dockerfile and a proxy, which must name what there is."""

import json
import re
import shutil
import subprocess
from importlib.metadata import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from restuning.cli.app import app
from restuning.serve import app as application

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "deploying.md").read_text()
LINES = (ROOT / "Dockerfile").read_text().splitlines()


def find(word):
    return [line.removeprefix(word).strip() for line in LINES if line.startswith(word + " ")]


def test_the_dockerfile_copies_and_installs_what_is_there():
    copied = [part for line in find("COPY") for part in line.split()[:-1]]
    assert all((ROOT / part).exists() for part in copied), copied
    # What the project's own file reads while it is installed must be there by then.
    assert re.search(r'^readme = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1] in copied
    extras = re.search(r'/src\[([\w,]+)\]"', "\n".join(LINES))[1].split(",")
    assert set(extras) <= set(metadata("restuning").get_all("Provides-Extra"))


def test_the_container_s_command_is_one_of_ours(tmp_path):
    (entry,), (more,) = find("ENTRYPOINT"), find("CMD")
    name, *given = json.loads(entry)
    assert name == "restuning"
    missing = [str(tmp_path / "none") if part == "/tasks" else part for part in json.loads(more)]
    done = CliRunner().invoke(app, [*given, *missing])
    # It comes as far as the folder: every option is known.
    assert str(tmp_path / "none") in str(done.exception)


def test_addresses_on_the_page_are_the_server_s(tmp_path):
    served = set(application([], watch=tmp_path).openapi()["paths"])
    asked = set(re.findall(r"path: (/\w+)", PAGE)) | {"/readyz"}
    assert asked <= served
    assert any("/readyz" in line for line in LINES)


@pytest.mark.skipif(shutil.which("nginx") is None, reason="no nginx here")
def test_nginx_takes_the_proxy_of_the_page(tmp_path):
    block = re.search(r"```nginx\n(.*?)```", PAGE, re.S)[1]
    # A certificate of its own is not what is tried.
    block = re.sub(r"\n *ssl_certificate\w* [^\n]*", "", block).replace("443 ssl", "8443")
    whole = f"pid {tmp_path}/pid;\nevents {{}}\nhttp {{\naccess_log off;\n{block}\n}}\n"
    (tmp_path / "nginx.conf").write_text(whole)
    done = subprocess.run(
        ["nginx", "-t", "-c", str(tmp_path / "nginx.conf"), "-e", str(tmp_path / "error.log")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
