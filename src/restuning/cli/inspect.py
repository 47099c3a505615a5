"""`restuning sites`, `info`, `methods`: where a backbone can be tuned, what a file is, what there is."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from restuning.cli.common import (
    Json,
    Random,
    Weights,
    command,
    complete_backbone,
    group,
    show_facts,
    show_json,
    show_rows,
)

app = group("Look at backbones, tasks and methods.")

Name = Annotated[str, typer.Argument(help="Backbone", autocompletion=complete_backbone)]


@command(app, "restuning sites timm:swin_tiny_patch4_window7_224 --random")
def sites(
    name: Name, weights: Weights = None, random: Random = False, as_json: Json = False
) -> None:
    """Where a backbone can be tuned, and how each place was proved."""
    from restuning.backbones import load_backbone

    rows = load_backbone(name, weights=weights, random=random).host().sites.rows()
    if as_json:
        show_json(rows)
    else:
        show_rows(rows, f"sites of {name}")


@command(app, "restuning info pets.task", "restuning info restuning-tiny")
def info(
    name: Annotated[str, typer.Argument(help="Task folder or backbone")],
    weights: Weights = None,
    random: Random = False,
    as_json: Json = False,
) -> None:
    """What a task folder or a backbone is."""
    facts = task_facts(Path(name)) if Path(name).is_dir() else backbone_facts(name, weights, random)
    if as_json:
        show_json(facts)
    else:
        show_facts(facts, name)


@command(
    app,
    "restuning methods",
    "restuning methods --backbone timm:vit_base_patch16_224 --random --classes 100",
    name="methods",
)
def list_methods(
    backbone: Annotated[
        str | None,
        typer.Option(help="Count parameters on this one", autocompletion=complete_backbone),
    ] = None,
    weights: Weights = None,
    random: Random = False,
    classes: Annotated[int, typer.Option(help="Classes of the head that is counted")] = 100,
    as_json: Json = False,
) -> None:
    """The named methods and where their defaults come from."""
    rows = method_rows(backbone, weights, random, classes)
    if as_json:
        show_json(rows)
    else:
        show_rows(rows, "methods")


def task_facts(folder: Path) -> dict[str, Any]:
    """What a task folder says of itself."""
    from restuning.task import describe

    description = describe(str(folder))
    task = description["task"]
    tuners = Counter(_kind(spec) for spec in task["tuners"].values())
    weights = folder / "weights.safetensors"
    return {
        "method": task["method"],
        "backbone": description["backbone"]["name"],
        "fingerprint": description["backbone"]["fingerprint"],
        "tuners": "bypass" if task["side"] else dict(tuners),
        "head": task["head"],
        "labels": task["labels"],
        "preprocessing": description["preprocessing"],
        "bytes": weights.stat().st_size if weights.exists() else None,
        "written by": description["library"],
    }


def backbone_facts(name: str, weights: Path | None, random: bool) -> dict[str, Any]:
    """What a backbone is, and what was found in it."""
    from restuning.backbones import load_backbone
    from restuning.training.run import describe_sites

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
    # A tuner may wrap another: its name in brackets, as deep as it goes.
    return f"{spec['kind']}({_kind(spec['tuner'])})" if "tuner" in spec else spec["kind"]


def method_rows(
    backbone: str | None, weights: Path | None, random: bool, classes: int
) -> list[dict[str, Any]]:
    """One row a method; with a backbone also its parameters there."""
    from restuning import methods
    from restuning._errors import RestuningError
    from restuning.backbones import load_backbone

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
        # That a method has no place in this backbone is an answer and not a failure.
        except RestuningError as error:
            row["tuner parameters"], row["with head"] = "not here", error.what
    return json.loads(json.dumps(rows))
