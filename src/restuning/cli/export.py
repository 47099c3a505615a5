"""`restuning export`: tasks and their backbone as one file that answers without this library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from restuning.cli.common import (
    AnyBackbone,
    Json,
    TaskBackbone,
    Weights,
    command,
    group,
    show_facts,
    show_json,
)

app = group("Tasks for other runtimes.")


@command(
    app,
    "restuning export runs/pets/pets.task --out pets.onnx",
    "restuning export pets.task,colours.task --to pt2 --out both.pt2",
)
def export(
    tasks: Annotated[
        str,
        typer.Argument(
            help="Task folder or name on the hub, or several with commas, of one backbone"
        ),
    ],
    out: Annotated[Path, typer.Option(help="File, by habit NAME.onnx or NAME.pt2")],
    runtime: Annotated[
        str, typer.Option("--to", help="onnx (ONNX Runtime, OpenVINO), or pt2 (torch.export)")
    ] = "onnx",
    backbone: TaskBackbone = None,
    weights: Weights = None,
    any_backbone: AnyBackbone = False,
    as_json: Json = False,
) -> None:
    """Write a backbone and all tasks on it into one file: one output a task, with its probabilities.

    Labels and preprocessing lie beside the graph, under `restuning.tasks`.
    """
    from dataclasses import asdict

    from restuning.serve import Predictor, export_tasks

    predictor = Predictor.load(
        tasks.split(","),
        backbone=backbone,
        weights=weights,
        any_backbone=any_backbone,
        device="cpu",
    )
    done = export_tasks(predictor, out, runtime=runtime)
    facts = {**asdict(done), "file": str(done.file), "tasks": list(done.tasks)}
    if as_json:
        show_json(facts)
    else:
        words = {
            "largest": "largest difference from PyTorch",
            "forwards": "passes through the backbone",
        }
        told = {words.get(k, k): v for k, v in facts.items()}
        show_facts(
            {**told, "tasks": ", ".join(done.tasks)}, f"{predictor.backbone.name} with its tasks"
        )
