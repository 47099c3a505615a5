"""Which architectures of timm are run, told from their sizes alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CAP = 20e6
"""Parameters up to which an architecture of timm is run; above it the smallest of its family."""

LARGEST = 100e6
"""No family's smallest above this is built: 0.4 GB of weights."""

SIZES = Path(__file__).with_name("sizes.json")
"""`{timm name: [parameters, module]}`, by `python tests/zoo/run.py --count`."""


def timm_names() -> dict[str, str]:
    """Names to run and their family (timm's module)."""
    sizes: dict[str, list[Any]] = json.loads(SIZES.read_text())
    chosen = {n: family for n, (p, family) in sizes.items() if p <= CAP}
    for family in {f for _, f in sizes.values()} - set(chosen.values()):
        parameters, name = min((p, n) for n, (p, f) in sizes.items() if f == family)
        if parameters <= LARGEST:
            chosen[name] = family
    return dict(sorted(chosen.items()))


def smallest() -> list[str]:
    """The smallest of every family that is run."""
    sizes: dict[str, list[Any]] = json.loads(SIZES.read_text())
    first: dict[str, tuple[int, str]] = {}
    for name, family in timm_names().items():
        first[family] = min(first.get(family, (10**12, "")), (sizes[name][0], name))
    return [f"timm:{name}" for _, name in first.values()]
