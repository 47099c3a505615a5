"""Diffusion models and pipelines from tiny configurations, with random weights and no download."""

import json
import string
from typing import Any

import torch
from torch import nn


class Case:
    """A denoiser, one input of two rows, and the same as the model takes it."""

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        self.model, self.args, self.kwargs = model.eval(), args, kwargs

    def __call__(self, **more: Any) -> torch.Tensor:
        with torch.no_grad():
            return self.model(*self.args, **{**self.kwargs, **more}).sample


def _noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


STEPS = torch.tensor([7, 400])


def unet(size: int | tuple[int, int] = 16, **config: Any) -> Case:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    height, width = (size, size) if isinstance(size, int) else size
    model = UNet2DConditionModel(
        **{
            "block_out_channels": (8, 16),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "cross_attention_dim": 8,
            "attention_head_dim": 4,
            "norm_num_groups": 4,
            "sample_size": 16,
            **config,
        }
    )
    width_of_text = model.config.cross_attention_dim
    return Case(
        model,
        _noise(2, model.config.in_channels, height, width),
        STEPS,
        encoder_hidden_states=_noise(2, 5, width_of_text, seed=2),
    )


def dit(**config: Any) -> Case:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "sample_size": 8,
            "patch_size": 2,
            "num_embeds_ada_norm": 10,
            "norm_num_groups": 4,
            **config,
        }
    )
    return Case(model, _noise(2, 4, 8, 8), timestep=STEPS, class_labels=torch.tensor([1, 2]))


def pixart() -> Case:
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        cross_attention_dim=16,
        caption_channels=8,
        use_additional_conditions=False,
    )
    return Case(
        model,
        _noise(2, 4, 8, 8),
        timestep=STEPS,
        encoder_hidden_states=_noise(2, 5, 8, seed=2),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    )


def sd3(words: int = 5) -> Case:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=8,
    )
    return Case(
        model,
        _noise(2, 4, 8, 8),
        timestep=STEPS,
        encoder_hidden_states=_noise(2, words, 8, seed=2),
        pooled_projections=_noise(2, 8, seed=3),
    )


def flux(words: int = 5) -> Case:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )
    places = torch.zeros(16, 3)
    places[:, 1], places[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    return Case(
        model,
        _noise(2, 16, 4),
        timestep=STEPS / 1000,
        encoder_hidden_states=_noise(2, words, 8, seed=2),
        pooled_projections=_noise(2, 8, seed=3),
        img_ids=places,
        txt_ids=torch.zeros(words, 3),
    )


CASES = {"unet": unet, "dit": dit, "pixart": pixart, "sd3": sd3, "flux": flux}


def tokenizer(folder):
    """One token a letter, from files written here."""
    from transformers import CLIPTokenizer

    letters = list(string.ascii_lowercase + string.digits + " ,.")
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=24
    )


def text_encoder(width: int = 8):
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=80,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
        bos_token_id=78,
        eos_token_id=79,
        pad_token_id=79,
    )
    return CLIPTextModel(config).eval()


def stable_diffusion(folder, **config: Any):
    """A Stable Diffusion pipeline of a few thousand parameters."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline

    torch.manual_seed(2)
    vae = AutoencoderKL(
        block_out_channels=(4, 8),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder(),
        tokenizer=tokenizer(folder),
        unet=unet(**config).model,
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sampled(pipeline, prompt, *, steps: int = 2, seed: int = 0, **more: Any) -> torch.Tensor:
    """Latents of a prompt, the same noise for the same seed."""
    return pipeline(
        prompt,
        num_inference_steps=steps,
        output_type="latent",
        height=32,
        width=32,
        generator=torch.Generator().manual_seed(seed),
        **more,
    ).images
