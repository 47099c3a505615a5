"""A plugin of pytest for PEFT's own tests: the shim in PEFT's place, and what became of every case.

`python -m pytest -p peft_cases ...` in the folder of PEFT's source. Cases of other methods and tests that
look into PEFT's own layers are not run; each has a reason, by a pattern of `peft.json`.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import peft
import peft_shim
import pytest

TABLE = json.loads((Path(__file__).parent / "peft.json").read_text(encoding="utf-8"))
PATTERNS = [(re.compile(row["pattern"]), row["reason"]) for row in TABLE["not applicable"]]
NAMES = (
    "PeftModel",
    "get_peft_model",
    "get_peft_model_state_dict",
    "get_base_model_state_dict",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "inject_adapter_in_model",
)
outcomes: dict[str, list[str]] = {}


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Put the shim in PEFT's place, and take out what is not applicable."""
    for module in {item.module for item in items}:
        common = vars(module).get("PeftCommonTester")
        spaces = [vars(module), *([_globals(common)] if common else [])]
        for space in spaces:
            space.update({n: getattr(peft_shim, n) for n in NAMES if n in space})
        several = vars(module).get("TestMultipleActiveAdapters")
        if several is not None:
            several.set_multiple_active_adapters = lambda _self, model, names: model.set_adapter(
                names
            )
    applicable = []
    for item in items:
        name = item.nodeid.removeprefix("tests/")
        reason = _other_method(item) or next((why for p, why in PATTERNS if p.search(name)), None)
        if reason:
            outcomes[name] = ["not applicable", reason]
        else:
            applicable.append(item)
    # Noted, and not skipped one by one: they are nine of ten.
    items[:] = applicable


def _globals(kind: Any) -> dict[str, Any]:
    return kind.check_modelcard.__globals__


def _other_method(item: Any) -> str | None:
    """Why a case is of another method, by the classes of its configurations."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    for value in params.values():
        kind = value if isinstance(value, type) else type(value)
        if issubclass(kind, peft.PeftConfig) and kind is not peft.LoraConfig:
            return peft_shim.OTHER_METHOD
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Any:
    """Note what became of a case."""
    report = yield
    name = item.nodeid.removeprefix("tests/")
    raised = call.excinfo.value if call.excinfo else None
    if isinstance(raised, peft_shim.NotApplicable):
        outcomes[name] = ["not applicable", str(raised)]
        report.outcome, report.longrepr = "skipped", ("", 0, str(raised))
    elif report.failed:
        outcomes[name] = ["failed", str(report.longrepr)]
    elif report.skipped:
        outcomes[name] = ["skipped by PEFT", str(report.longrepr[-1])]
    elif report.when == "call":
        outcomes[name] = ["passed", ""]
    return report


def pytest_sessionfinish() -> None:
    """Write what became of every case."""
    Path(os.environ["PEFT_OUTCOMES"]).write_text(json.dumps(outcomes, indent=1), encoding="utf-8")
