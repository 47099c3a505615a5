"""What makes two calls of `fit` the same run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from restuning._errors import TrainingError
from restuning.train.settings import FitSettings


def run_identity(task: nn.Module, settings: FitSettings, train: Any, val: Any) -> dict[str, Any]:
    """The settings that matter, the sizes of the data, and a digest of the task's form."""
    form = {n: [list(t.shape), str(t.dtype)] for n, t in task.state_dict().items()}
    spec = task.spec() if callable(getattr(task, "spec", None)) else None  # type: ignore[operator]
    text = json.dumps([form, spec], sort_keys=True, default=str)
    return {
        **settings.identity(),
        "training examples": len(train),
        "validation examples": 0 if val is None else len(val),
        "task": hashlib.sha256(text.encode()).hexdigest()[:16],
    }


def check_same_run(before: Mapping[str, Any], now: Mapping[str, Any], out: Path) -> None:
    """Refuse to go on from a run with other settings.

    Raises:
        TrainingError: Names everything that differs.
    """
    names = [n for n in {**before, **now} if before.get(n) != now.get(n)]
    if names:
        raise TrainingError(
            "this folder holds a run with other settings",
            where=str(out),
            found="; ".join(f"{n}: {before.get(n)!r} then, {now.get(n)!r} now" for n in names),
            fix="use the settings of then, another --out, or --no-resume to start over",
        )
