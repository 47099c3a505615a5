"""`restuning import-peft` and `export-peft`: LoRA checkpoints of PEFT as tasks, and tasks as those."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from restuning.cli.common import (
    Json,
    Random,
    TaskBackbone,
    Weights,
    command,
    complete_backbone,
    group,
    show_facts,
    show_json,
)

app = group("Exchange LoRA with PEFT.")


@command(
    app,
    "restuning import-peft adapter/ --backbone hf:bert-base-uncased --out polite.task",
    "restuning import-peft adapter/ --backbone hf:bert-base-uncased --leave-out classifier "
    "--out polite.task",
    name="import-peft",
)
def import_peft(
    folder: Annotated[
        Path, typer.Argument(help="With adapter_config.json and adapter_model.safetensors")
    ],
    out: Annotated[Path, typer.Option(help="Task folder to write")],
    backbone: Annotated[
        str,
        typer.Option(help="The one it was trained on", autocompletion=complete_backbone),
    ],
    weights: Weights = None,
    random: Random = False,
    prefix: Annotated[
        str | None, typer.Option(help="Names before the backbone's paths; default: found")
    ] = None,
    leave_out: Annotated[
        list[str] | None,
        typer.Option(help="A module that was trained whole and is to be left behind"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Read a LoRA checkpoint of PEFT as a task; nothing in it is executed."""
    from restuning.backbones import load_backbone
    from restuning.task import import_peft as read
    from restuning.task import save

    opened = load_backbone(backbone, weights=weights, random=random)
    host = opened.host()
    told: dict[str, str] = {}
    task = read(
        folder,
        host,
        prefix=prefix,
        leave_out=leave_out or (),
        tell_prefix=lambda found: told.update(prefix=found),
    )
    how = opened.preprocessing.to_dict() if opened.preprocessing is not None else None
    save(task, host, out, backbone=backbone, weights=opened.weights_file, preprocessing=how)
    # Found or given: whoever knows the model sees whether it is the right one of two halves.
    _say({"task": str(out), "sites": len(task.sites), **told, **_count(task)}, as_json)


@command(
    app,
    "restuning export-peft polite.task --out adapter/",
    "restuning export-peft polite.task --out adapter/ --prefix bert --without-head",
    name="export-peft",
)
def export_peft(
    task: Annotated[Path, typer.Argument(help="Task folder of lora")],
    out: Annotated[Path, typer.Option(help="Folder to write")],
    prefix: Annotated[
        str, typer.Option(help="Names before the backbone's paths in the model PEFT will load into")
    ] = "",
    without_head: Annotated[
        bool, typer.Option("--without-head", help="Leave the head behind; PEFT has no place for it")
    ] = False,
    dtype: Annotated[str, typer.Option(help="Of the tensors: fp32, bf16, fp16")] = "fp32",
    backbone: TaskBackbone = None,
    weights: Weights = None,
    as_json: Json = False,
) -> None:
    """Write a task of lora as a checkpoint that PEFT loads."""
    from restuning.serve import open_task
    from restuning.task import export_peft as write

    lora, opened, host = open_task(task, backbone=backbone, weights=weights)
    library, _, model = opened.name.partition(":")
    write(
        lora,
        host,
        out,
        prefix=prefix,
        without_head=without_head,
        base_model=model.partition("@")[0] if library == "hf" else None,
        dtype=dtype,
    )
    _say({"adapter": str(out), "sites": len(lora.sites), **_count(lora)}, as_json)


def _count(task: Any) -> dict[str, int]:
    return {"numbers": sum(p.numel() for p in task.parameters())}


def _say(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        show_json(facts)
    else:
        show_facts(facts, "LoRA")
