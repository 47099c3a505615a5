"""Networks of the benchmark: two denoisers, a text encoder, and the judge of attributes.

Denoisers see pictures of 32 x 32 x 3 folded to 16 x 16 x 12, which loses nothing and stands where an
autoencoder's latents would: a step costs a quarter.
"""

from __future__ import annotations

from typing import Any

import shapes
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from restuning.diffusion import EncodedPairs

TEXT = 64
FOLD = 2
CHANNELS, SIDE = 3 * FOLD**2, shapes.SIZE // FOLD


def folded(images: Tensor) -> Tensor:
    """`b 3 32 32` to what a denoiser works on, `b 12 16 16`."""
    return F.pixel_unshuffle(images, FOLD)


def unfolded(latents: Tensor) -> Tensor:
    """The inverse of `folded`."""
    return F.pixel_shuffle(latents, FOLD)


def unet() -> nn.Module:
    """A UNet of 2.7 million parameters, laid out as that of Stable Diffusion XL."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def dit() -> nn.Module:
    """A diffusion transformer of 1.8 million parameters on patches of 4 pixels."""
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=6,
        sample_size=SIDE,
        patch_size=2,
        cross_attention_dim=128,
        caption_channels=TEXT,
        use_additional_conditions=False,
    )


FIXED: dict[str, dict[str, Any]] = {
    "unet": {},
    "dit": {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
}
NETWORKS = {"unet": unet, "dit": dit}


def text_states(captions: list[str]) -> Tensor:
    """States of a small CLIP text encoder with weights drawn once, `n 10 64`: it only tells words
    and their order apart, and the denoiser learns what they mean.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng([]):
        torch.manual_seed(7)
        encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(shapes.WORDS),
                hidden_size=TEXT,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=shapes.LENGTH,
                eos_token_id=shapes.WORDS.index("<end>"),
                bos_token_id=0,
                pad_token_id=0,
            )
        ).eval()
    with torch.no_grad():
        return encoder(shapes.tokens(captions)).last_hidden_state


def encoded(shown: list[shapes.Scene], style: str, seed: int) -> EncodedPairs:
    """A set for training."""
    captions = [s.caption for s in shown]
    unique = list(dict.fromkeys(captions))
    latents = folded(shapes.pictures(shown, style, seed))
    return EncodedPairs(
        latents,
        torch.zeros_like(latents),
        {"encoder_hidden_states": text_states(unique)},
        torch.tensor([unique.index(c) for c in captions]),
        {"encoder_hidden_states": text_states([""])},
        tuple(captions),
        f"{style}-{seed}-{len(shown)}",
    )


def base_set() -> EncodedPairs:
    """What a base model is trained on: plain pictures, no stars."""
    return encoded(shapes.scenes(3000, 1), "plain", 1)


class Judge(nn.Module):
    """Reads shape, colour, size and place off a picture of either style; its last features measure
    distances between sets ("FD_judge", which is no FID).
    """

    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 64),
            nn.ReLU(),
        )
        self.heads = nn.ModuleList(nn.Linear(64, len(n)) for n in shapes.ATTRIBUTES.values())

    def forward(self, images: Tensor) -> Tensor:
        """Features, `b 64`."""
        return self.body(images)

    def labels(self, images: Tensor) -> Tensor:
        """Classes of every attribute, `b 4`."""
        features = self(images)
        return torch.stack([head(features).argmax(1) for head in self.heads], 1)


def trained_judge(steps: int = 1500, seed: int = 0) -> tuple[Judge, float]:
    """A judge, and the share of attributes it reads rightly on pictures it has not seen."""
    torch.manual_seed(seed)
    judge = Judge()
    optimiser = torch.optim.AdamW(judge.parameters(), lr=2e-3)
    shown = shapes.scenes(4096, seed + 1, shapes.SHAPES)
    halves = [shapes.pictures(shown[:2048], "plain", 1), shapes.pictures(shown[2048:], "paper", 2)]
    images, labels = torch.cat(halves), torch.tensor([s.labels for s in shown])
    for step in range(steps):
        rows = torch.randint(len(images), (64,))
        # A little noise: generated pictures are never as clean as drawn ones.
        features = judge(images[rows] + 0.1 * torch.randn(64, *images.shape[1:]))
        loss = sum(
            F.cross_entropy(head(features), labels[rows, i]) for i, head in enumerate(judge.heads)
        )
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps)
        loss.backward()  # type: ignore[union-attr]
        optimiser.step()
        optimiser.zero_grad()
    judge.eval().requires_grad_(False)
    held = shapes.scenes(512, seed + 2, shapes.SHAPES)
    right = [
        (judge.labels(shapes.pictures(held, style, 3)) == torch.tensor([s.labels for s in held]))
        for style in ("plain", "paper")
    ]
    return judge, float(torch.stack(right).float().mean())
