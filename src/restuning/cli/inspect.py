"""What `sites`, `info` and `methods` print."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from restuning import methods
from restuning._errors import RestuningError
from restuning.backbones import load_backbone
from restuning.task import describe
from restuning.training.run import describe_sites


def site_rows(name: str, weights: Path | None, random: bool) -> list[dict[str, Any]]:
    """One row a site."""
    backbone = load_backbone(name, weights=weights, random=random)
    return backbone.host().sites.rows()


def facts(name: str, weights: Path | None, random: bool) -> dict[str, Any]:
    """A task folder's or a backbone's facts."""
    if Path(name).is_dir():
        description = describe(name)
        task = description["task"]
        tuners = Counter(_kind(spec) for spec in task["tuners"].values())
        return {
            "method": task["method"],
            "backbone": description["backbone"]["name"],
            "fingerprint": description["backbone"]["fingerprint"],
            "tuners": "bypass" if task["side"] else dict(tuners),
            "head": task["head"],
            "labels": task["labels"],
            "preprocessing": description["preprocessing"],
            "bytes": (Path(name) / "weights.safetensors").stat().st_size
            if (Path(name) / "weights.safetensors").exists()
            else None,
            "written by": description["library"],
        }
    backbone = load_backbone(name, weights=weights, random=random)
    host = backbone.host()
    rule = host.readout_rule
    return {
        "class": type(backbone.model).__name__,
        "weights": backbone.weights,
        "parameters": sum(p.numel() for p in backbone.model.parameters()),
        "layers": host.sites.layers,
        "sites": describe_sites(host),
        "readout": f"{rule.pool}, norm {rule.norm or 'none'}, width {rule.dim} ({rule.proof})",
        "preprocessing": backbone.preprocessing.to_dict() if backbone.preprocessing else "text",
        "fingerprint": host.fingerprint(),
    }


def _kind(spec: dict[str, Any]) -> str:
    return f"{spec['kind']}({_kind(spec['tuner'])})" if "tuner" in spec else spec["kind"]


def method_rows(
    backbone: str | None, weights: Path | None, random: bool, classes: int
) -> list[dict[str, Any]]:
    """One row a method; with a backbone also its parameters there."""
    rows = [{"method": n, "what": w, "from": s} for n, w, s in methods.table()]
    if backbone is None:
        return rows
    loaded = load_backbone(backbone, weights=weights, random=random)
    host = loaded.host()
    for row in rows:
        try:
            task = methods.build(row["method"], host, num_classes=classes)
            row["tuner parameters"] = f"{task.tuner_parameters():,}"
            row["with head"] = f"{task.trainable_parameters():,}"
        except RestuningError as error:
            row["tuner parameters"], row["with head"] = "not here", error.what
    return json.loads(json.dumps(rows))
