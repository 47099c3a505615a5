"""`restuning sites`, `info`, `methods`: where a backbone can be tuned, what a file is, what there is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from restuning.cli.common import (
    Json,
    Random,
    Revision,
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


@command(
    app,
    "restuning sites timm:swin_tiny_patch4_window7_224 --random",
    "restuning sites timm:vit_tiny_patch16_224 --random --linear",
)
def sites(
    name: Name,
    weights: Weights = None,
    random: Random = False,
    linear: Annotated[
        bool, typer.Option("--linear", help="Linear maps and convolutions inside the blocks")
    ] = False,
    as_json: Json = False,
) -> None:
    """Where a backbone can be tuned, and how each place was proved."""
    from restuning.backbones import load_backbone

    found = load_backbone(name, weights=weights, random=random).host().sites
    rows = found.linear.rows() if linear else found.rows()
    if as_json:
        show_json(rows)
    else:
        show_rows(rows, f"{'linear ' if linear else ''}sites of {name}")


@command(
    app,
    "restuning info pets.task",
    "restuning info restuning-tiny",
    "restuning info user/pets --revision v1",
)
def info(
    name: Annotated[str, typer.Argument(help="Task folder, a task's name on the hub, or backbone")],
    revision: Revision = None,
    weights: Weights = None,
    random: Random = False,
    as_json: Json = False,
) -> None:
    """What a task folder, a task on a hub or a backbone is; of a hub also the commit."""
    from restuning.backbones import load_backbone
    from restuning.task import HubTask, summarise

    if Path(name).is_dir() or HubTask.read(name):
        facts = summarise(name, revision)
    elif revision is not None:
        raise typer.BadParameter(f"{name} is no task on a hub", param_hint="--revision")
    else:
        facts = load_backbone(name, weights=weights, random=random).summarise()
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
    classes: Annotated[int, typer.Option(help="Classes of the head that is counted", min=1)] = 100,
    as_json: Json = False,
) -> None:
    """The named methods and where their defaults come from."""
    from restuning import methods
    from restuning.backbones import load_backbone

    rows = [{"method": n, "what": w, "from": s} for n, w, s in methods.table()]
    if backbone is not None:
        host = load_backbone(backbone, weights=weights, random=random).host()
        sizes = methods.count_parameters(host, classes)
        rows = [{**row, **sizes[row["method"]]} for row in rows]
    if as_json:
        show_json(rows)
    else:
        show_rows(rows, "methods")
