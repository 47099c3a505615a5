"""`tune_pipeline`: from captioned images to a task of a text-to-image pipeline, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from restuning import methods
from restuning.backbones.diffusion import TextToImage, load_text_to_image
from restuning.diffusion.encode import encode
from restuning.diffusion.objective import STEPS, Objective
from restuning.diffusion.pairs import load_pairs
from restuning.diffusion.pictures import save_grid
from restuning.diffusion.settings import DenoiserSettings
from restuning.diffusion.train import DenoiserTraining, train_denoiser
from restuning.host import Host
from restuning.task import Task
from restuning.training.callbacks import Callback
from restuning.training.device import on_device
from restuning.training.run import Log, log_line
from restuning.training.trackers import check_installed

BYPASS_RANK, INSIDE_RANK = 64, 50
"""Defaults of a bypass and of tuners inside, the latter the paper's 2.5 M on Stable Diffusion v1.5."""

CAPTIONS_DRAWN = 4
"""Captions in a row of a sample grid, where no prompts are given."""


@dataclass(frozen=True)
class Samples:
    """The grids that are drawn while a pipeline is tuned, and at the end.

    Attributes:
        prompts: All drawn in one row; empty for the first four captions of the data.
        steps: Denoiser calls of a picture.
        guidance: Scale of classifier-free guidance.
    """

    prompts: Sequence[str] = ()
    steps: int = 25
    guidance: float = 7.5


@dataclass(frozen=True)
class PipelineRequest:
    """What is tuned, on what, and how.

    Attributes:
        data: Folder of images with captions, or a parquet file; see `load_pairs`.
        pipeline: Folder of a diffusers pipeline, or a name on the hub.
        method: A name of `methods.names()`.
        rank: Of the tuners; None for 64 in a bypass and 50 inside.
        kernel: Of the maps between stages of a bypass: 1 or 3.
        settings: Settings of training.
        size: Side of the images in pixels; None for the pipeline's own.
        min_snr: Cap of min-SNR weights; None weighs all times alike.
        samples: Grids that are drawn.
    """

    data: str | Path
    pipeline: str
    method: str = "res-tuning-bypass"
    rank: int | None = None
    kernel: int = 1
    settings: DenoiserSettings = field(default_factory=DenoiserSettings)
    size: int | None = None
    min_snr: float | None = None
    samples: Samples = field(default_factory=Samples)


@dataclass(frozen=True)
class TunedPipeline:
    """A finished run.

    Attributes:
        task: With its trained weights, in eval mode.
        folder: What it left: `NAME.task`, `samples/`, `log.jsonl`, `checkpoints/`.
        task_folder: The task as `restuning.load` takes it.
        metrics: `method`, `parameters` of the tuners, `steps`, mean `loss` of the last tenth,
            `seconds`.
    """

    task: Task = field(repr=False)
    folder: Path
    task_folder: Path
    metrics: dict[str, Any]


def tune_pipeline(
    request: PipelineRequest,
    *,
    out: str | Path,
    name: str = "style",
    store: str | Path | None = None,
    device: str | torch.device | None = None,
    resume: bool = True,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
    log: Log = log_line,
) -> TunedPipeline:
    """Encode images and captions, train, draw and save: all `restuning train-image-generation` does.

    The pipeline itself is not changed. Killed and called again with the same request and the same
    `out`, it goes on and ends the same.

    Args:
        request: What is tuned.
        out: Folder of the run.
        name: Of the task folder, `NAME.task`.
        store: Where latents are kept; None for a folder `latents` beside `out`.
        device: "cpu", "cuda", "cuda:1"; None for CUDA if it is there.
        resume: False starts over.
        progress: A bar on a terminal, and lines elsewhere.
        callbacks: As of `DenoiserTraining`.
        log: Receives a line for each thing that is decided; by itself Python's logger `restuning` does.

    Raises:
        UnknownNameError: No such method.
        BackboneError: The pipeline cannot be loaded.
        DataError: Images or captions are missing or malformed.
        RestuningError: As `train_denoiser`.
    """
    # Before images are encoded, which may take hours.
    methods.check(request.method)
    check_installed(request.settings.track)
    out, settings = Path(out), request.settings
    pairs = load_pairs(request.data)
    with on_device(device) as place:
        parts = load_text_to_image(request.pipeline, device=str(place), size=request.size)
        kind: Any = parts.objective
        objective = Objective(kind, parts.alphas, request.min_snr, parts.conditioning.time_scale)
        encoded = encode(pairs, parts, parts.size, store or out.parent / "latents")
        log(f"{len(pairs)} images, {len(set(pairs.captions))} captions, latents {encoded.key}")
        example, named = parts.example
        more: dict[str, Any] = dict(named)
        host = Host(parts.denoiser, *example, **more)
        options = _method_options(request, parts)
        # Right before weights are drawn: loading and encoding, which may be skipped, shift nothing.
        torch.manual_seed(settings.seed)
        task = methods.build(request.method, host, **options).to(place)
        log(f"{request.method}: {task.tuner_parameters():,} parameters")
        # Each caption once, in their order.
        prompts = request.samples.prompts or list(dict.fromkeys(pairs.captions))[:CAPTIONS_DRAWN]

        def draw(step: int) -> Path:
            # The pipeline as it is above the tuned one, both from the same noise.
            rows = [
                parts.generate(
                    prompts,
                    steps=request.samples.steps,
                    guidance=request.samples.guidance,
                    seed=settings.seed,
                    using=host.using(used),
                )
                for used in (None, task)
            ]
            file = out / "samples" / f"step-{step:06d}.png"
            save_grid(torch.cat(rows), file, len(prompts))
            return file

        training = DenoiserTraining(
            host,
            {name: task},
            encoded,
            objective,
            settings,
            out,
            parts.fixed,
            backbone=f"diffusers:{request.pipeline}",
            draw=draw,
            callbacks=callbacks,
        )
        result = train_denoiser(training, resume=resume, progress=progress)
    metrics = {
        "method": request.method,
        "parameters": task.tuner_parameters(),
        "steps": result["steps"],
        "loss": result["loss"][name],
        "seconds": result["seconds"],
    }
    return TunedPipeline(task, out, out / f"{name}.task", metrics)


def _method_options(request: PipelineRequest, parts: TextToImage) -> dict[str, Any]:
    inside = "bypass" not in request.method
    usual = INSIDE_RANK if inside else BYPASS_RANK
    rank = {"rank": usual if request.rank is None else request.rank}
    if inside:
        return rank
    return {
        **rank,
        "kernel": request.kernel,
        "time_scale": STEPS / parts.conditioning.time_scale,
    }
