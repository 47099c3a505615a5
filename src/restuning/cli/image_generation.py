"""`train-image-generation`: tune a text-to-image pipeline on captioned images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from restuning.cli.common import (
    BACKBONE,
    DATA,
    FEATURES,
    METHOD,
    OPTIMISER,
    OUTPUT,
    BatchSize,
    Device,
    Json,
    NoResume,
    Precision,
    command,
    complete_method,
    group,
    messages,
    option,
    show_json,
    show_rows,
)
from restuning.cli.config import Config

app = group("Tune a text-to-image pipeline.")

BYPASS_RANK = 64
"""Default of a bypass; tuners inside have 50, which is the paper's 2.5 M on Stable Diffusion v1.5."""


@command(
    app,
    "restuning train-image-generation photos/ --pipeline ./stable-diffusion-v1-5",
    "restuning train-image-generation flowers.parquet --pipeline ./sd "
    "--method 'res-tuning[mha=adapter,ffn=adapter]' --prompt 'a balloon flower'",
    name="train-image-generation",
)
def train_image_generation(
    data: Annotated[Path, typer.Argument(help="Folder of images with captions, or parquet")],
    pipeline: Annotated[str, option(BACKBONE, "Folder of a diffusers pipeline, or a hub name")],
    size: Annotated[int | None, option(DATA, "Side in pixels; default: the pipeline's")] = None,
    caption_drop: Annotated[float, option(DATA, "Share of captions left empty")] = 0.1,
    device: Device = None,
    method: Annotated[
        str, option(METHOD, "A named method", autocompletion=complete_method)
    ] = "res-tuning-bypass",
    rank: Annotated[int | None, option(METHOD, "64 for a bypass, else 50")] = None,
    kernel: Annotated[int, option(METHOD, "Maps between stages of a bypass: 1 or 3")] = 1,
    steps: Annotated[int, option(OPTIMISER, "Of the optimiser")] = 1000,
    batch_size: BatchSize = 16,
    lr: Annotated[
        float, option(OPTIMISER, "Highest learning rate", "--lr", "--learning-rate")
    ] = 1e-3,
    min_snr: Annotated[
        float | None, option(OPTIMISER, "Cap of min-SNR weights, e.g. 5; default: none")
    ] = None,
    clip: Annotated[float, option(OPTIMISER, "Largest gradient norm")] = 1.0,
    ema: Annotated[
        float | None, option(OPTIMISER, "Decay of a running mean of weights; default: none")
    ] = None,
    precision: Precision = "no",
    accumulate: Annotated[int, option(OPTIMISER, "Pieces a batch is run in")] = 1,
    seed: Annotated[int, option(OPTIMISER, "Of weights, order, noise and samples")] = 0,
    store: Annotated[Path | None, option(FEATURES, "Where latents are kept")] = None,
    out: Annotated[Path, option(OUTPUT, "Folder; the same folder resumes a run")] = Path(
        "runs/image-generation"
    ),
    name: Annotated[str, option(OUTPUT, "Of the task folder, NAME.task")] = "style",
    checkpoint_every: Annotated[int, option(OUTPUT, "Steps between checkpoints")] = 100,
    sample_every: Annotated[
        int | None, option(OUTPUT, "Steps between sample grids; default: none are drawn")
    ] = None,
    prompt: Annotated[list[str] | None, option(OUTPUT, "Of the grids; default: captions")] = None,
    sample_steps: Annotated[int, option(OUTPUT, "Denoiser calls of a sample")] = 25,
    guidance: Annotated[float, option(OUTPUT, "Classifier-free guidance of a sample")] = 7.5,
    no_resume: NoResume = False,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Tune a text-to-image pipeline; the pipeline itself is not changed."""
    import torch

    from restuning import methods
    from restuning.backbones.diffusion import load_text_to_image
    from restuning.diffusion import (
        DenoiserSettings,
        DenoiserTraining,
        Objective,
        encode,
        load_pairs,
        save_grid,
        train_denoiser,
    )
    from restuning.diffusion.objective import STEPS
    from restuning.host import Host
    from restuning.training.device import on_device

    report = messages(as_json)
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
    with on_device(device) as where:
        parts = load_text_to_image(pipeline, device=str(where), size=size)
        objective = Objective(parts.objective, parts.alphas, min_snr, parts.conditioning.time_scale)  # type: ignore[arg-type]
        encoded = encode(pairs, parts, parts.size, store or out.parent / "latents")
        report.print(
            f"{len(pairs)} images, {len(set(pairs.captions))} captions, latents {encoded.key}"
        )
        example, named = parts.example
        more: dict[str, Any] = dict(named)
        host = Host(parts.denoiser, *example, **more)
        bypass = "bypass" in method
        options: dict[str, Any] = {"rank": rank or (BYPASS_RANK if bypass else 50)}
        if bypass:
            options |= {"kernel": kernel, "time_scale": STEPS / parts.conditioning.time_scale}
        # Right before weights are drawn: loading and encoding, which may be skipped, shift nothing.
        torch.manual_seed(seed)
        task = methods.build(method, host, **options).to(where)
        report.print(f"{method}: {task.tuner_parameters():,} parameters")
        # Each caption once, in their order; four are a row of the grid.
        prompts = list(prompt or dict.fromkeys(pairs.captions))[:4]

        def draw(step: int) -> None:
            # The pipeline as it is above the tuned one, both from the same noise.
            rows = [
                parts.generate(
                    prompts,
                    steps=sample_steps,
                    guidance=guidance,
                    seed=seed,
                    using=host.using(used),
                )
                for used in (None, task)
            ]
            save_grid(torch.cat(rows), out / "samples" / f"step-{step:06d}.png", len(prompts))

        result = train_denoiser(
            DenoiserTraining(
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
        show_json(row)
    else:
        show_rows([row], f"{data} with {pipeline}")
