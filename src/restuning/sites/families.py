"""What structure cannot settle, as rows of data: `(block class, operation) -> fields of a site`.

A row is written only with evidence (a failing proof in `restuning sites`), names the class of the
block and overrides fields of the found site; paths are relative to the block. Its proof reads
"declared".
"""

from __future__ import annotations

from typing import Any

ROWS: dict[tuple[str, str], dict[str, str]] = {}


def declared_sites(block: str, path: str) -> dict[str, dict[str, Any]]:
    """The rows of a block class, with whole paths, by operation."""
    rows: dict[str, dict[str, Any]] = {}
    for (name, op), fields in ROWS.items():
        if name == block:
            whole = {k: f"{path}.{v}" if v else path for k, v in fields.items()}
            rows[op] = {**whole, "proof": "declared"}
    return rows
