"""`train-image-generation`: tune a text-to-image pipeline on captioned images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from restuning import methods
from restuning.cli.frame import Json, app, console, show_rows

BYPASS_RANK = 64
"""Default of a bypass; tuners inside have 50, which is the paper's 2.5 M on Stable Diffusion v1.5."""


@app.command(
    "train-image-generation",
    epilog="[bold]Examples[/bold]\n\nrestuning train-image-generation photos/ --pipeline "
    "./stable-diffusion-v1-5\n\nrestuning train-image-generation flowers.parquet --pipeline "
    "./sd --method 'res-tuning[[mha=adapter,ffn=adapter]' --prompt 'a balloon flower'",
)
def train_image_generation(
    data: Annotated[Path, typer.Argument(help="Folder of images with captions, or parquet")],
    pipeline: Annotated[str, typer.Option(help="Folder of a diffusers pipeline, or a hub name")],
    method: Annotated[str, typer.Option(help="A named method")] = "res-tuning-bypass",
    out: Annotated[Path, typer.Option(help="Folder; the same folder resumes a run")] = Path(
        "runs/image-generation"
    ),
    name: Annotated[str, typer.Option(help="Of the task folder, NAME.task")] = "style",
    rank: Annotated[int | None, typer.Option(help="64 for a bypass, else 50")] = None,
    kernel: Annotated[int, typer.Option(help="Maps between stages of a bypass: 1 or 3")] = 1,
    size: Annotated[
        int | None, typer.Option(help="Side in pixels; default: the pipeline's")
    ] = None,
    steps: Annotated[int, typer.Option(help="Of the optimiser")] = 1000,
    batch_size: int = 16,
    lr: Annotated[float, typer.Option(help="Highest learning rate")] = 1e-3,
    caption_drop: Annotated[float, typer.Option(help="Share of captions left empty")] = 0.1,
    min_snr: Annotated[float | None, typer.Option(help="Cap of min-SNR weights, e.g. 5")] = None,
    clip: Annotated[float, typer.Option(help="Largest gradient norm")] = 1.0,
    ema: Annotated[float | None, typer.Option(help="Decay of a running mean of weights")] = None,
    precision: Annotated[str, typer.Option(help="no, bf16, fp16")] = "no",
    accumulate: Annotated[int, typer.Option(help="Pieces a batch is run in")] = 1,
    seed: int = 0,
    checkpoint_every: int = 100,
    sample_every: Annotated[int | None, typer.Option(help="Steps between sample grids")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Of the grids; default: captions")
    ] = None,
    sample_steps: Annotated[int, typer.Option(help="Denoiser calls of a sample")] = 25,
    guidance: float = 7.5,
    store: Annotated[Path | None, typer.Option(help="Where latents are kept")] = None,
    no_resume: Annotated[bool, typer.Option("--no-resume", help="Start over")] = False,
    as_json: Json = False,
) -> None:
    """Tune a text-to-image pipeline; the pipeline itself is not changed."""
    import torch

    from restuning.backbones.diffusion import load_text_to_image
    from restuning.diffusion import (
        DenoiserSettings,
        Objective,
        Run,
        encode,
        load_pairs,
        save_grid,
        train_denoiser,
    )
    from restuning.diffusion.objective import STEPS
    from restuning.host import Host

    told = Console(stderr=True) if as_json else console
    settings = DenoiserSettings(
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        caption_drop=caption_drop,
        clip=clip,
        ema=ema,
        precision=precision,
        accumulate=accumulate,
        seed=seed,
        checkpoint_every=checkpoint_every,
        sample_every=sample_every,
    )
    pairs = load_pairs(data)
    where = "cuda" if torch.cuda.is_available() else "cpu"
    parts = load_text_to_image(pipeline, device=where, size=size)
    objective = Objective(parts.objective, parts.alphas, min_snr, parts.reading.time_scale)  # type: ignore[arg-type]
    encoded = encode(pairs, parts, parts.size, store or out.parent / "latents")
    told.print(f"{len(pairs)} images, {len(set(pairs.captions))} captions, latents {encoded.key}")
    example, named = parts.example
    more: dict[str, Any] = dict(named)
    host = Host(parts.denoiser, *example, **more)
    bypass = "bypass" in method
    options: dict[str, Any] = {"rank": rank or (BYPASS_RANK if bypass else 50)}
    if bypass:
        options |= {"kernel": kernel, "time_scale": STEPS / parts.reading.time_scale}
    torch.manual_seed(seed)
    task = methods.build(method, host, **options).to(where)
    told.print(f"{method}: {task.tuner_parameters():,} parameters")
    prompts = list(prompt or dict.fromkeys(pairs.captions))[:4]

    def draw(step: int) -> None:
        rows = [
            parts.generate(
                prompts, steps=sample_steps, guidance=guidance, seed=seed, using=host.using(used)
            )
            for used in (None, task)
        ]
        save_grid(torch.cat(rows), out / "samples" / f"step-{step:06d}.png", len(prompts))

    result = train_denoiser(
        Run(
            host,
            {name: task},
            encoded,
            objective,
            settings,
            out,
            parts.fixed,
            backbone=f"diffusers:{pipeline}",
            draw=draw,
        ),
        resume=not no_resume,
    )
    row = {
        "method": method,
        "parameters": task.tuner_parameters(),
        "steps": result["steps"],
        "loss": result["loss"][name],
        "seconds": result["seconds"],
        "task": str(out / f"{name}.task"),
    }
    if as_json:
        typer.echo(json.dumps(row, indent=1))
    else:
        show_rows([row], f"{data} with {pipeline}")
