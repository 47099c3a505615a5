"""`restuning engine export`: a backbone as a file that other runtimes run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from restuning.cli.common import Json, Random, Weights, command, group, show_facts, show_json

app = group("Backbones for other runtimes.")


@app.callback()
def _group() -> None:
    pass  # typer makes one command a group only where there is a callback


@command(
    app,
    "restuning engine export --backbone timm:vit_small_patch16_224 --int8 --out vit-s.onnx",
    "restuning train photos/ --backbone onnx:vit-s.onnx --method res-tuning-bypass",
)
def export(
    out: Annotated[Path, typer.Option(help="File, by habit NAME.onnx or NAME.pt2")],
    backbone: Annotated[
        str, typer.Option(help="restuning-tiny, timm:NAME, hf:NAME or torchvision:NAME")
    ],
    weights: Weights = None,
    random: Random = False,
    image_size: Annotated[
        int | None,
        typer.Option(help="Pixels, for timm's; the same as NAME@PIXELS; default: its own", min=1),
    ] = None,
    runtime: Annotated[
        str, typer.Option("--engine", help="onnx (also for OpenVINO), or pt2 (torch.export)")
    ] = "onnx",
    int8: Annotated[
        bool, typer.Option("--int8", help="Weights a channel, activations as they come; ONNX")
    ] = False,
    tokens: Annotated[
        str, typer.Option(help="auto (what the readout needs), cls, last, pool, all")
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Write a backbone with its taps; then --backbone onnx:FILE, openvino:FILE or pt2:FILE."""
    import torch

    from restuning.backbones import add_image_size, export_engine, load_backbone

    # With --random the same weights each time, so that an engine can be made again.
    torch.manual_seed(0)
    name = add_image_size(backbone, image_size)
    loaded = load_backbone(name, weights=weights, random=random)
    done = export_engine(
        loaded, out, runtime=runtime, precision="int8" if int8 else "fp32", tokens=tokens
    )
    facts = {**asdict(done), "file": str(done.file)}
    if as_json:
        show_json(facts)
    else:
        words = {"largest": "largest error of a tap", "relative": "largest relative error"}
        show_facts({words.get(k, k): v for k, v in facts.items()}, f"{name} as an engine")
