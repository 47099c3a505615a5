"""Runs PEFT's own tests of LoRA over the shim: `python tests/peers/run_peft.py` writes `peft.json` anew.

PEFT's source is taken from `PEFT_SDIST` (an archive or a folder), else by pip from its index into a cache.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TABLE = HERE / "peft.json"
FILE = "test_custom_models.py"
"""Of PEFT's tests the file whose models are made by the file itself."""

SECONDS = 900
"""A run takes about a tenth of it on one core."""


class NoSource(Exception):  # noqa: N818
    """PEFT's source is not here and cannot be fetched."""


def installed() -> str:
    """The version of PEFT whose tests are meant."""
    return importlib.metadata.version("peft")


def unpack(into: Path) -> Path:
    """PEFT's source in a folder of its own, in which its tests are a package."""
    given = os.environ.get("PEFT_SDIST")
    archive = Path(given) if given else _download()
    if archive.is_dir():
        raise NoSource("PEFT_SDIST is a folder: give the archive, which is unpacked anew")
    with tarfile.open(archive) as packed:
        packed.extractall(into, filter="data")
    (root,) = into.iterdir()
    if root.name != f"peft-{installed()}":
        raise NoSource(f"the source is {root.name}, installed is {installed()}")
    # The archive leaves it out, and the tests import one another.
    (root / "tests" / "__init__.py").touch()
    return root


def _download() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    cache = home / "restuning" / "peft"
    archive = cache / f"peft-{installed()}.tar.gz"
    if not archive.exists():
        cache.mkdir(parents=True, exist_ok=True)
        wanted = ["--no-binary", "peft", "--no-deps", f"peft=={installed()}", "-d", str(cache)]
        pip = [sys.executable, "-m", "pip", "download", "-q", *wanted]
        got = subprocess.run(pip, capture_output=True, text=True, timeout=SECONDS, check=False)
        if got.returncode or not archive.exists():
            raise NoSource(f"pip download gave no {archive.name}: {got.stderr.strip()[-200:]}")
    return archive


def run(root: Path, *arguments: str) -> dict[str, list[str]]:
    """What became of every case: `[outcome, why]` by its name."""
    with tempfile.TemporaryDirectory() as folder:
        outcomes = Path(folder) / "outcomes.json"
        source = str(HERE.parents[1] / "src")
        env = {
            **os.environ,
            "PEFT_OUTCOMES": str(outcomes),
            "PYTHONPATH": os.pathsep.join([source, str(HERE), os.environ.get("PYTHONPATH", "")]),
            "HF_HUB_OFFLINE": "1",
        }
        options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "peft_cases"]
        # Other forms of tracebacks parse the whole file again for each of two thousand.
        pytest = [sys.executable, "-m", "pytest", *options, "--tb=native", f"tests/{FILE}"]
        ended = subprocess.run(
            [*pytest, *arguments],
            cwd=root,
            env=env,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        if not outcomes.exists():
            raise RuntimeError(f"PEFT's tests did not run: {(ended.stdout + ended.stderr)[-2000:]}")
        return json.loads(outcomes.read_text(encoding="utf-8"))


def count(outcomes: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    """By test: how many cases passed, failed, were skipped by PEFT, or are not applicable and why."""
    tests: dict[str, dict[str, Any]] = {}
    for name, (outcome, why) in sorted(outcomes.items()):
        row = tests.setdefault(name.partition("::")[2].partition("[")[0], {})
        if outcome == "not applicable":
            reasons = row.setdefault(outcome, {})
            reasons[why] = reasons.get(why, 0) + 1
        else:
            row[outcome] = row.get(outcome, 0) + 1
    return tests


def other_files(root: Path) -> dict[str, dict[str, Any]]:
    """PEFT's other files of tests, the number of functions in each, and why they are not run."""
    rules = json.loads(TABLE.read_text(encoding="utf-8"))["files not run"]
    found: dict[str, dict[str, Any]] = {}
    for path in sorted((root / "tests").rglob("test_*.py")):
        name = path.relative_to(root / "tests").as_posix()
        if name == FILE:
            continue
        why = next((r["reason"] for r in rules if re.fullmatch(r["pattern"], name)), "")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        tests = sum(
            isinstance(n, ast.FunctionDef) and n.name.startswith("test_") for n in ast.walk(tree)
        )
        found[name] = {"tests": tests, "reason": why}
    return found


def main() -> None:
    """Write what became of every case beside the rules in `peft.json`."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        root = unpack(Path(folder))
        outcomes = run(root)
        table |= {"peft": installed(), "tests": count(outcomes), "files": other_files(root)}
    TABLE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{Counter(outcome for outcome, _ in outcomes.values())}\n")
    for name, (outcome, why) in outcomes.items():
        if outcome == "failed":
            sys.stdout.write(f"{name}\n{why[-800:]}\n")


if __name__ == "__main__":
    main()
