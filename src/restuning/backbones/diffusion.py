"""Text-to-image pipelines of diffusers: a denoiser, what makes its inputs, and what makes images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from restuning._errors import BackboneError, require
from restuning.fingerprint import weights_digest

PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "flow_prediction": "flow"}


@dataclass(frozen=True)
class TextToImage:
    """A pipeline whose denoiser reads the states of one text encoder.

    Attributes:
        name: Folder or hub name.
        pipeline: The user's own, untouched.
        denoiser: Its UNet or transformer.
        objective: "epsilon", "v" or "flow", as its scheduler says.
        alphas: The schedule's cumulative products; None for flow.
        size: Side of its images in pixels.
    """

    name: str
    pipeline: Any
    denoiser: nn.Module
    objective: str
    alphas: Tensor | None
    size: int

    @property
    def example(self) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """One input, as `Host` wants it."""
        config: Any = self.denoiser.config
        side = min(int(config.sample_size), 32)
        draw = torch.Generator().manual_seed(0)
        sample = torch.randn(1, config.in_channels, side, side, generator=draw)
        device = next(self.denoiser.parameters()).device
        states = {k: v.to(device) for k, v in self.texts(["a picture"]).items()}
        return (sample.to(device),), {"timestep": torch.tensor([500], device=device), **states}

    @torch.no_grad()
    def images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of `b 3 h w` in -1 to 1."""
        vae = self.pipeline.vae
        found = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        scale = vae.config.scaling_factor
        return (found.mean - shift) * scale, found.std * scale

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """States of captions, cut to what the text encoder takes."""
        tokenizer, encoder = self.pipeline.tokenizer, self.pipeline.text_encoder
        tokens = tokenizer(
            list(captions), padding="max_length", truncation=True, return_tensors="pt",
            max_length=tokenizer.model_max_length,
        ).input_ids  # fmt: skip
        return {"encoder_hidden_states": encoder(tokens.to(encoder.device))[0].float()}

    def identity(self) -> dict[str, Any]:
        """Digests of everything that latents and text states depend on."""
        tokenizer = self.pipeline.tokenizer
        words = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
        return {
            "vae": weights_digest(self.pipeline.vae),
            "text encoder": weights_digest(self.pipeline.text_encoder),
            "tokenizer": hashlib.sha256(words).hexdigest()[:16],
            "tokens": tokenizer.model_max_length,
        }

    def generate(
        self, prompts: Sequence[str], *, steps: int = 25, guidance: float = 7.5, seed: int = 0,
        size: int | None = None, using: AbstractContextManager | None = None,
    ) -> Tensor:  # fmt: skip
        """Images of prompts, `b 3 h w` in 0 to 1; every prompt's noise has its own seed.

        Args:
            prompts: Captions.
            steps: Of the pipeline's own scheduler.
            guidance: Of guidance without a classifier.
            seed: Of the first prompt; the next has the next.
            size: Side in pixels; None for the pipeline's own.
            using: `host.using(task)`.
        """
        draws = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
        side = size or self.size
        quiet = getattr(self.pipeline, "_progress_bar_config", {})
        self.pipeline.set_progress_bar_config(disable=True)
        try:
            with using or nullcontext():
                return self.pipeline(
                    list(prompts), num_inference_steps=steps, guidance_scale=guidance,
                    height=side, width=side, generator=draws, output_type="pt",
                ).images.float().cpu()  # fmt: skip
        finally:
            self.pipeline.set_progress_bar_config(**quiet)


def load_text_to_image(name: str | Path, *, device: str = "cpu") -> TextToImage:
    """Load a pipeline from a folder or the hub.

    Raises:
        MissingExtraError: diffusers is not installed.
        BackboneError: It is not there, or of a kind that has to be driven from Python.
    """
    diffusers = require("diffusers", "diffusion", f"the pipeline {name}")
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(str(name))
    except (OSError, ValueError, KeyError, ImportError, AttributeError, RuntimeError) as error:
        words = (str(error).strip().splitlines() or ["no more is known"])[0]
        raise BackboneError(
            "a pipeline could not be loaded", where=str(name),
            found=f"{type(error).__name__}: {words[:200]}",
            fix="give a folder that pipeline.save_pretrained wrote, or a hub name and a network",
        ) from None  # fmt: skip
    return text_to_image(pipeline.to(device), str(name))


def text_to_image(pipeline: Any, name: str = "") -> TextToImage:
    """The parts of a pipeline that is there already.

    Raises:
        BackboneError: Its denoiser reads more than the states of one text encoder.
    """
    parts = pipeline.components
    denoiser = parts.get("unet") or parts.get("transformer")
    wanted = ("vae", "tokenizer", "text_encoder", "scheduler")
    missing = [p for p in wanted if parts.get(p) is None]
    more = [p for p in ("text_encoder_2", "text_encoder_3") if parts.get(p) is not None]
    added = getattr(getattr(denoiser, "config", None), "addition_embed_type", None)
    if denoiser is None or missing or more or added:
        raise BackboneError(
            "this pipeline cannot be trained from the command line",
            where=name or type(pipeline).__name__,
            found=f"lacks {', '.join(missing)}" if missing
            else f"has {', '.join(more) or added or 'no denoiser'}",
            fix="in Python: encode its conditions yourself and call "
            "restuning.diffusion.train_denoiser (docs/diffusion.md)",
        )  # fmt: skip
    scheduler = pipeline.scheduler
    flow = "FlowMatch" in type(scheduler).__name__
    kind = "flow" if flow else PREDICTIONS.get(scheduler.config.get("prediction_type", "epsilon"))
    if kind is None:
        raise BackboneError(
            "the scheduler predicts something that we cannot train", where=name,
            found=str(scheduler.config.get("prediction_type")), fix=", ".join(PREDICTIONS),
        )  # fmt: skip
    # With the names of its blocks the autoencoder says how much smaller latents are.
    factor = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    alphas = None if flow else scheduler.alphas_cumprod.float().cpu()
    size = int(denoiser.config.sample_size) * factor
    return TextToImage(name, pipeline, denoiser, kind, alphas, size)
