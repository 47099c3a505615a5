"""Text-to-image pipelines of diffusers: a denoiser, what makes its inputs, and what makes images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from restuning._errors import BackboneError, require
from restuning.backbones.conditions import (
    Conditioning,
    find_conditioning,
    nest_conditions,
    pack_latents,
)
from restuning.backbones.trust import read_config
from restuning.host import weights_digest

PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "flow_prediction": "flow"}


@dataclass(frozen=True)
class TextToImage:
    """The parts of a pipeline that training needs.

    Attributes:
        name: Folder or hub name.
        pipeline: The user's own, untouched.
        denoiser: Its UNet or transformer.
        objective: "epsilon", "v" or "flow", as its scheduler says.
        alphas: The schedule's cumulative products; None for flow.
        size: Side of its images in pixels.
        conditioning: How its denoiser is given captions.
    """

    name: str
    pipeline: Any
    denoiser: nn.Module
    objective: str
    alphas: Tensor | None
    size: int
    conditioning: Conditioning

    @property
    def side(self) -> int:
        """Side of its latents."""
        # With the names of its blocks the autoencoder says how much smaller latents are.
        return self.size // 2 ** (len(self.pipeline.vae.config.block_out_channels) - 1)

    @property
    def fixed(self) -> dict[str, Any]:
        """Further inputs of the denoiser, the same for every row."""
        return self.conditioning.fixed(self.pipeline, self.side)

    @property
    def example(self) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """One input, as `Host` wants it; latents of 32 pixels at most."""
        small = replace(self, size=self.size * min(self.side, 32) // self.side)
        device = next(self.denoiser.parameters()).device
        draw = torch.Generator().manual_seed(0)
        channels = self.pipeline.vae.config.latent_channels
        sample = torch.randn(1, channels, small.side, small.side, generator=draw).to(device)
        conditions = {k: v.to(device) for k, v in small.texts(["a picture"]).items()}
        time = torch.tensor([self.conditioning.time_scale / 2], device=device)
        inputs = {"timestep": time, **nest_conditions(conditions), **small.fixed}
        return (pack_latents(sample) if self.conditioning.packed else sample,), inputs

    @torch.no_grad()
    def images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of `b 3 h w` in -1 to 1, as they are read."""
        vae = self.pipeline.vae
        latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        scale = vae.config.scaling_factor
        mean, std = (latents.mean - shift) * scale, latents.std * scale
        return (pack_latents(mean), pack_latents(std)) if self.conditioning.packed else (mean, std)

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Conditions of captions, cut to what the text encoders take."""
        conditions = self.conditioning.texts(self.pipeline, captions, self.size)
        return {n: t.float() if t.is_floating_point() else t for n, t in conditions.items()}

    def identity(self) -> dict[str, Any]:
        """Digests of everything that latents and text states depend on."""
        parts = {n: p for n, p in self.pipeline.components.items() if p is not None}
        digests = {
            "vae": weights_digest(self.pipeline.vae),
            "denoiser": type(self.denoiser).__name__,
        }
        for name, part in parts.items():
            if name.startswith("text_encoder"):
                digests[name] = weights_digest(part)
            elif name.startswith("tokenizer"):
                words = json.dumps([sorted(part.get_vocab().items()), part.model_max_length])
                digests[name] = hashlib.sha256(words.encode()).hexdigest()[:16]
        return digests

    def generate(
        self,
        prompts: Sequence[str],
        *,
        steps: int = 25,
        guidance: float = 7.5,
        seed: int = 0,
        using: AbstractContextManager | None = None,
    ) -> Tensor:
        """Images of prompts, `b 3 h w` in 0 to 1; every prompt's noise has its own seed.

        Args:
            prompts: Captions.
            steps: Of the pipeline's own scheduler.
            guidance: Of guidance without a classifier.
            seed: Of the first prompt; the next has the next.
            using: `host.using(task)`.
        """
        # A generator a prompt: the noise of one must not depend on how many are drawn with it.
        draws = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
        quiet = getattr(self.pipeline, "_progress_bar_config", {})
        self.pipeline.set_progress_bar_config(disable=True)
        try:
            with using or nullcontext():
                return (
                    self.pipeline(
                        list(prompts),
                        num_inference_steps=steps,
                        guidance_scale=guidance,
                        height=self.size,
                        width=self.size,
                        generator=draws,
                        output_type="pt",
                        **self.conditioning.call,
                    )
                    .images.float()
                    .cpu()
                )
        finally:
            self.pipeline.set_progress_bar_config(**quiet)


def load_text_to_image(
    name: str | Path, *, device: str = "cpu", size: int | None = None
) -> TextToImage:
    """Load a pipeline from a folder or the hub.

    Args:
        name: Folder or hub name.
        device: Where it goes.
        size: Side of images in pixels; None for the pipeline's own.

    Raises:
        MissingExtraError: diffusers is not installed.
        BackboneError: It is not there, or of a kind that has to be driven from Python.
    """
    diffusers = require("diffusers", "diffusion", f"the pipeline {name}")
    _refuse_code(Path(name))
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(str(name))
    except (OSError, ValueError, KeyError, ImportError, AttributeError, RuntimeError) as error:
        words = (str(error).strip().splitlines() or ["no more is known"])[0]
        raise BackboneError(
            "a pipeline could not be loaded",
            where=str(name),
            found=f"{type(error).__name__}: {words[:200]}",
            fix="give a folder that pipeline.save_pretrained wrote, or a hub name and a network",
        ) from None
    parts = text_to_image(pipeline.to(device), str(name))
    return parts if size is None else replace(parts, size=size)


def _is_known(package: Any) -> bool:
    """Whether a part's package is a library of models, or a pipeline of diffusers with classes of its own."""
    if package in ("diffusers", "transformers"):
        return True
    named = isinstance(package, str) and package.isidentifier()
    return named and find_spec(f"diffusers.pipelines.{package}") is not None


def _refuse_code(folder: Path) -> None:
    """Refuse a folder whose index names classes of other packages, or of files that lie in it.

    Raises:
        BackboneError: It does, or the index is malformed.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        return
    for part, said in read_config(index, str(folder)).items():
        # `[package, class]` of a part; of a pipeline with code of its own also `_class_name`.
        package = said[0] if isinstance(said, list) and said else None
        if package is None or (part.startswith("_") and part != "_class_name"):
            continue
        if not _is_known(package) or any(folder.rglob(f"{package}.py")):
            raise BackboneError(
                "a pipeline brings code of its own or of another package, which is not run",
                where=str(folder),
                found=f"{part}: {said}"[:200],
                fix="build it in a program of yours, and give it to "
                "restuning.backbones.diffusion.text_to_image",
            )


def text_to_image(pipeline: Any, name: str = "") -> TextToImage:
    """The parts of a pipeline that is there already.

    Raises:
        BackboneError: It lacks a part, or its denoiser is of a kind whose conditions are not known.
    """
    parts = pipeline.components
    denoiser = parts.get("unet") or parts.get("transformer")
    required = ("vae", "tokenizer", "text_encoder", "scheduler")
    missing = [p for p in required if parts.get(p) is None]
    conditioning = None if denoiser is None or missing else find_conditioning(denoiser)
    if denoiser is None or conditioning is None:
        raise BackboneError(
            "this pipeline cannot be trained from the command line",
            where=name or type(pipeline).__name__,
            found=f"lacks {', '.join(missing) or 'a denoiser'}"
            if missing or denoiser is None
            else f"{type(denoiser).__name__}, of which it is not known what it reads",
            fix="in Python: encode its conditions yourself and call "
            "restuning.diffusion.train_denoiser (docs/diffusion.md)",
        )
    scheduler = pipeline.scheduler
    flow = "FlowMatch" in type(scheduler).__name__
    kind = "flow" if flow else PREDICTIONS.get(scheduler.config.get("prediction_type", "epsilon"))
    if kind is None:
        raise BackboneError(
            "the scheduler predicts something that we cannot train",
            where=name,
            found=str(scheduler.config.get("prediction_type")),
            fix=", ".join(PREDICTIONS),
        )
    # A flow is a straight line between noise and image: there is no schedule to know.
    alphas = None if flow else scheduler.alphas_cumprod.float().cpu()
    factor = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    own = getattr(denoiser.config, "sample_size", None) or pipeline.default_sample_size
    return TextToImage(name, pipeline, denoiser, kind, alphas, int(own) * factor, conditioning)
