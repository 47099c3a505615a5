"""`train-image-generation`: tune a text-to-image pipeline on captioned images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from restuning.cli.common import (
    BACKBONE,
    DATA,
    FEATURES,
    METHOD,
    OPTIMISER,
    OUTPUT,
    Accumulate,
    BatchSize,
    CheckpointEvery,
    Device,
    Ema,
    Json,
    NoResume,
    Precision,
    Track,
    command,
    complete_method,
    group,
    messages,
    option,
    show_json,
    show_rows,
)
from restuning.cli.config import Config
from restuning.cli.results import log_to
from restuning.cli.speech import is_quiet

app = group("Tune a text-to-image pipeline.")


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
    size: Annotated[
        int | None, option(DATA, "Side in pixels; default: the pipeline's", min=1)
    ] = None,
    caption_drop: Annotated[float, option(DATA, "Share of captions left empty")] = 0.1,
    device: Device = None,
    method: Annotated[
        str, option(METHOD, "A named method", autocompletion=complete_method)
    ] = "res-tuning-bypass",
    rank: Annotated[int | None, option(METHOD, "64 for a bypass, else 50", min=1)] = None,
    kernel: Annotated[int, option(METHOD, "Maps between stages of a bypass: 1 or 3")] = 1,
    steps: Annotated[int, option(OPTIMISER, "Of the optimiser", min=1)] = 1000,
    batch_size: BatchSize = 16,
    lr: Annotated[
        float, option(OPTIMISER, "Highest learning rate", "--lr", "--learning-rate")
    ] = 1e-3,
    min_snr: Annotated[
        float | None, option(OPTIMISER, "Cap of min-SNR weights, e.g. 5; default: none")
    ] = None,
    clip: Annotated[float, option(OPTIMISER, "Largest gradient norm")] = 1.0,
    ema: Ema = None,
    precision: Precision = "no",
    accumulate: Accumulate = 1,
    seed: Annotated[int, option(OPTIMISER, "Of weights, order, noise and samples")] = 0,
    store: Annotated[Path | None, option(FEATURES, "Where latents are kept")] = None,
    out: Annotated[Path, option(OUTPUT, "Folder; the same folder resumes a run")] = Path(
        "runs/image-generation"
    ),
    name: Annotated[str, option(OUTPUT, "Of the task folder, NAME.task")] = "style",
    checkpoint_every: CheckpointEvery = 100,
    sample_every: Annotated[
        int | None, option(OUTPUT, "Steps between sample grids; default: one at the end", min=1)
    ] = None,
    prompt: Annotated[
        list[str] | None, option(OUTPUT, "Of the grids; default: four captions")
    ] = None,
    sample_steps: Annotated[int, option(OUTPUT, "Denoiser calls of a sample", min=1)] = 25,
    guidance: Annotated[float, option(OUTPUT, "Classifier-free guidance of a sample")] = 7.5,
    no_resume: NoResume = False,
    track: Track = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Tune a text-to-image pipeline; the pipeline itself is not changed."""
    from restuning.diffusion import DenoiserSettings, PipelineRequest, Samples, tune_pipeline

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
        track=tuple(track or ()),
    )
    request = PipelineRequest(
        data,
        pipeline,
        method,
        rank,
        kernel,
        settings,
        size,
        min_snr,
        Samples(tuple(prompt or ()), sample_steps, guidance),
    )
    tuned = tune_pipeline(
        request,
        out=out,
        name=name,
        store=store,
        device=device,
        resume=not no_resume,
        progress=not is_quiet(),
        log=log_to(messages(as_json)),
    )
    row = {**tuned.metrics, "task": str(tuned.task_folder)}
    if as_json:
        show_json(row)
    else:
        show_rows([row], f"{data} with {pipeline}")
