"""Writes `docs/peft.md` from what became of PEFT's own tests: `python docs/draw_peft.py`."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULT = HERE.parent / "tests" / "peers" / "peft.json"

TEXT = """# PEFT's own tests

PEFT's tests of adapters on small models, `test_custom_models.py` of its source, version {version}, run over
this library: a shim (`tests/peers/peft_shim.py`) stands in PEFT's place and answers `get_peft_model`, `PeftModel`,
`merge_and_unload` and the others by `Host`, `Task`, `Tuned`, `Blend`, `PerRow`, `merge`, `import_peft` and
`export_peft`. `python tests/peers/run_peft.py` runs them and counts anew; `pytest -m longer tests/peers` holds them
to these counts.

{summary}

Two things are the shim's own. It keeps the names of adapters, which is active and which is merged, so that tests of
nothing but names say little about this library; they are counted apart. And the models of that file have no blocks,
which a host looks for (`Host` alone refuses them): the shim names their linear maps and convolutions itself.

## What passed

{passed}

## What does not apply, and why

That a case does not apply is this library's own word, said by the shim or a list of names beside it (`tests/peers/peft.json`): what PEFT can do
and this library refuses stands here and not under "failed". A configuration is held to what `import_peft` refuses; the rest are the cases of other methods, and tests that look into the
layers that PEFT puts into a model, of which there are none here.

{reasons}

{skipped} cases are skipped by PEFT itself.

## Files that are not run

{files}
"""


def result() -> dict[str, Any]:
    """The committed result."""
    return json.loads(RESULT.read_text(encoding="utf-8"))


def page(table: dict[str, Any]) -> str:
    """The whole page."""
    tests = table["tests"]
    names = re.compile("|".join(table["names alone"]))
    passed = {name: row["passed"] for name, row in tests.items() if row.get("passed")}
    of_names = sum(n for name, n in passed.items() if names.search(name))
    reasons: Counter[str] = Counter()
    for row in tests.values():
        reasons.update(row.get("not applicable", {}))
    all_cases = sum(reasons.values()) + sum(
        row.get(kind, 0)
        for row in tests.values()
        for kind in ("passed", "failed", "skipped by PEFT")
    )
    failed = sum(row.get("failed", 0) for row in tests.values())
    left_out, all_passed = sum(reasons.values()), sum(passed.values())
    summary = (
        f"**Of {all_cases:,} cases {all_passed:,} passed, {failed:,} failed, and "
        f"{left_out:,} do not apply**, {reasons[OTHER]:,} of them because they are of another method "
        f"than LoRA. Of LoRA's own {all_passed + failed + left_out - reasons[OTHER]:,}, that is, "
        f"{all_passed:,} passed and {left_out - reasons[OTHER]:,} do not apply; of those that passed, "
        f"{of_names:,} are about names alone, and {all_passed - of_names:,} about what is computed, saved or trained."
    )
    lines = [
        f"| `{name.rpartition('::')[2]}` | {n:,} | {'names' if names.search(name) else ''} |"
        for name, n in passed.items()
    ]
    whys = [f"| {why.replace('|', '/')} | {n:,} |" for why, n in reasons.most_common()]
    files = [
        f"| `{name}` | {row['tests']} | {row['reason']} |" for name, row in table["files"].items()
    ]
    return TEXT.format(
        version=table["peft"],
        summary=summary,
        passed="\n".join(["| test | cases | |", "|---|---:|---|", *lines]),
        reasons="\n".join(["| why | cases |", "|---|---:|", *whys]),
        skipped=sum(row.get("skipped by PEFT", 0) for row in tests.values()),
        files="\n".join(["| file | functions | why |", "|---|---:|---|", *files]),
    )


OTHER = "another method than LoRA"

if __name__ == "__main__":
    (HERE / "peft.md").write_text(page(result()), encoding="utf-8")
