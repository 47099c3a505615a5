"""What the denoisers of diffusers read beside latents and time: one row a kind of denoiser.

Conditions are flat, one row a caption, so that they can be kept and shared out; a dot in a name stands
for a dictionary that the denoiser takes (`added_cond_kwargs.time_ids`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Conditions = dict[str, Tensor]

RESOLUTIONS_FROM = 128
"""Side of PixArt's latents from which its denoiser is told resolution and aspect ratio."""

FLUX_TOKENS = 512
"""Tokens that Flux pads captions to, as its pipeline does by default."""


@dataclass(frozen=True)
class Conditioning:
    """How a kind of denoiser is conditioned.

    Attributes:
        texts: `(pipeline, captions, side of the image in pixels) -> conditions`.
        fixed: `(pipeline, side of the latents) -> further inputs`, the same for every row.
        packed: Whether it reads latents as a sequence of patches of 2 x 2 pixels.
        time_scale: What it is told at the end of time.
        call: What its pipeline has to be told to draw what it was trained on.
    """

    texts: Callable[[Any, Sequence[str], int], Conditions]
    fixed: Callable[[Any, int], dict[str, Any]] = lambda pipeline, side: {}
    packed: bool = False
    time_scale: float = 1000.0
    call: dict[str, Any] = field(default_factory=dict)


def find_conditioning(denoiser: nn.Module) -> Conditioning | None:
    """How a denoiser is conditioned; None where it is of another kind."""
    # By name: importing diffusers to compare classes takes seconds.
    kind = type(denoiser).__name__
    if kind == "UNet2DConditionModel":
        config: Any = denoiser.config
        return _UNETS.get(config.addition_embed_type)
    return _TRANSFORMERS.get(kind)


def nest_conditions(conditions: Mapping[str, Tensor]) -> dict[str, Any]:
    """Conditions as a denoiser takes them: `a.b` becomes `{"a": {"b": ...}}`."""
    nested: dict[str, Any] = {}
    for name, value in conditions.items():
        outer, _, inner = name.partition(".")
        if inner:
            nested.setdefault(outer, {})[inner] = value
        else:
            nested[name] = value
    return nested


def pack_latents(latents: Tensor) -> Tensor:
    """`b c 2h 2w -> b hw 4c`, as Flux reads latents."""
    b, c, height, width = latents.shape
    patches = latents.view(b, c, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(b, height * width // 4, 4 * c)


def _device(pipeline: Any) -> torch.device:
    return (pipeline.components.get("unet") or pipeline.transformer).device


def _states(pipeline: Any, captions: Sequence[str], size: int) -> Conditions:
    states, *_ = pipeline.encode_prompt(
        list(captions),
        device=_device(pipeline),
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
    )
    return {"encoder_hidden_states": states}


def _sdxl(pipeline: Any, captions: Sequence[str], size: int) -> Conditions:
    states, _, pooled, _ = pipeline.encode_prompt(
        list(captions), device=_device(pipeline), do_classifier_free_guidance=False
    )
    if pipeline.config.force_zeros_for_empty_prompt:
        # Its guidance leads away from zeros, not from the states of an empty caption.
        has_text = torch.tensor([bool(c) for c in captions], device=states.device)
        has_text = has_text.to(states.dtype)
        states, pooled = states * has_text[:, None, None], pooled * has_text[:, None]
    # Size of the original, corner of the cut, size of the image: squares cut from the middle.
    ids = torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32)
    return {
        "encoder_hidden_states": states,
        "added_cond_kwargs.text_embeds": pooled,
        "added_cond_kwargs.time_ids": ids.repeat(len(captions), 1),
    }


def _sd3(pipeline: Any, captions: Sequence[str], size: int) -> Conditions:
    states, _, pooled, _ = pipeline.encode_prompt(
        list(captions), None, None, device=_device(pipeline), do_classifier_free_guidance=False
    )
    return {"encoder_hidden_states": states, "pooled_projections": pooled}


def _pixart(pipeline: Any, captions: Sequence[str], size: int) -> Conditions:
    states, mask, _, _ = pipeline.encode_prompt(
        list(captions), device=_device(pipeline), do_classifier_free_guidance=False
    )
    conditions = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
    if pipeline.transformer.config.sample_size == RESOLUTIONS_FROM:
        rows = len(captions)
        # The small PixArt was trained without both.
        conditions["added_cond_kwargs.resolution"] = torch.full((rows, 2), float(size))
        conditions["added_cond_kwargs.aspect_ratio"] = torch.ones(rows, 1)
    return conditions


def _pixart_fixed(pipeline: Any, side: int) -> dict[str, Any]:
    if pipeline.transformer.config.sample_size == RESOLUTIONS_FROM:
        return {}
    return {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


def _flux(pipeline: Any, captions: Sequence[str], size: int) -> Conditions:
    states, pooled, _ = pipeline.encode_prompt(
        list(captions), None, device=_device(pipeline), max_sequence_length=FLUX_TOKENS
    )
    conditions = {"encoder_hidden_states": states, "pooled_projections": pooled}
    if pipeline.transformer.config.guidance_embeds:
        # Distilled guidance of 1 is none, as diffusers' own training examples have it.
        conditions["guidance"] = torch.ones(len(captions))
    return conditions


def _flux_fixed(pipeline: Any, side: int) -> dict[str, Any]:
    device = _device(pipeline)
    # The first of three coordinates is for video, and texts have none.
    places = torch.zeros(side // 2, side // 2, 3, device=device)
    places[..., 1] = torch.arange(side // 2, device=device)[:, None]
    places[..., 2] = torch.arange(side // 2, device=device)[None]
    return {"img_ids": places.flatten(0, 1), "txt_ids": torch.zeros(FLUX_TOKENS, 3, device=device)}


_UNETS = {None: Conditioning(_states), "text_time": Conditioning(_sdxl)}
_TRANSFORMERS = {
    "SD3Transformer2DModel": Conditioning(_sd3),
    "PixArtTransformer2DModel": Conditioning(
        _pixart, _pixart_fixed, call={"use_resolution_binning": False, "clean_caption": False}
    ),
    "FluxTransformer2DModel": Conditioning(_flux, _flux_fixed, packed=True, time_scale=1.0),
}
