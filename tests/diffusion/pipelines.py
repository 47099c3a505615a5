"""Pipelines of every kind of denoiser from tiny configurations, with no download."""

import torch

from diffusion.small import stable_diffusion, text_encoder, tokenizer, unet

SIDE = 16
"""Of images in pixels: latents of 8, as the tiny autoencoder halves once."""


def _vae(**config):
    from diffusers import AutoencoderKL

    torch.manual_seed(2)
    return AutoencoderKL(
        block_out_channels=(4, 8),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **config,
    )


def _projecting_encoder(width=8):
    from transformers import CLIPTextModelWithProjection

    torch.manual_seed(3)
    config = text_encoder(width).config
    config.projection_dim = width
    return CLIPTextModelWithProjection(config).eval()


def _t5(width=8):
    """A T5 encoder, and a tokenizer of one token a letter."""
    import string

    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words = ["<pad>", "</s>", "<unk>", *string.ascii_lowercase, *string.digits, " "]
    letters = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    torch.manual_seed(4)
    encoder = T5EncoderModel(
        T5Config(vocab_size=64, d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    return encoder.eval(), made


def _quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sdxl(folder):
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    model = unet(
        sample_size=SIDE // 2,
        cross_attention_dim=16,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 8,
    ).model
    return _quiet(
        StableDiffusionXLPipeline(
            vae=_vae(),
            text_encoder=text_encoder(),
            text_encoder_2=_projecting_encoder(),
            tokenizer=tokenizer(folder),
            tokenizer_2=tokenizer(folder),
            unet=model,
            scheduler=DDIMScheduler(),
            add_watermarker=False,
        )
    )


def sd3(folder):
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    t5, letters = _t5(32)
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=SIDE // 2,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
    )
    return _quiet(
        StableDiffusion3Pipeline(
            transformer=model.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=_vae(shift_factor=0.1),
            text_encoder=_projecting_encoder(),
            tokenizer=tokenizer(folder),
            text_encoder_2=_projecting_encoder(),
            tokenizer_2=tokenizer(folder),
            text_encoder_3=t5,
            tokenizer_3=letters,
        )
    )


def pixart(folder):
    from diffusers import DDIMScheduler, PixArtAlphaPipeline

    from diffusion.small import pixart as small

    t5, letters = _t5()
    return _quiet(
        PixArtAlphaPipeline(
            tokenizer=letters,
            text_encoder=t5,
            vae=_vae(),
            transformer=small().model,
            scheduler=DDIMScheduler(),
        )
    )


def flux(folder):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    t5, letters = _t5()
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(shift_factor=0.1),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(folder),
        text_encoder_2=t5,
        tokenizer_2=letters,
        transformer=model.eval(),
    )
    pipeline.default_sample_size = SIDE // 2
    return _quiet(pipeline)


def sd15(folder):
    return stable_diffusion(folder, sample_size=SIDE // 2)


PIPELINES = {"sd15": sd15, "sdxl": sdxl, "sd3": sd3, "pixart": pixart, "flux": flux}
