"""Sounds that are drawn, whose truth is known, and small backbones of sounds with random, awake weights."""

from pathlib import Path

import numpy as np
import torch
import transformers as hf

from awake import wake

RATE = 8_000
SECONDS = 0.6


def tone(pitch, seconds=SECONDS, rate=RATE, noise=0.02, seed=0):
    """A sine of some hertz in a little noise."""
    draw = np.random.default_rng(seed)
    at = np.arange(round(seconds * rate)) / rate
    wave = 0.5 * np.sin(2 * np.pi * pitch * at + draw.uniform(0, 6.28))
    return (wave + noise * draw.standard_normal(len(at))).astype(np.float32)


def write(file: Path, wave, rate=RATE, **how) -> Path:
    import soundfile

    file.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(file, wave, rate, **how)
    return file


def folder(where: Path, each=12, pitches=(300, 1200), seconds=SECONDS) -> Path:
    """`CLASS/*.wav` of two pitches, low and high, of several lengths."""
    for name, pitch in zip(("low", "high"), pitches, strict=True):
        for n in range(each):
            wave = tone(pitch * (1 + 0.01 * n), seconds * (0.7 + 0.05 * (n % 7)), seed=n)
            write(where / name / f"{n:02}.wav", wave)
    return where


SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def ast_config():
    return hf.ASTConfig(
        **SIZES, patch_size=8, frequency_stride=8, time_stride=8, max_length=48, num_mel_bins=16
    )


def wav2vec2_config(kind=hf.Wav2Vec2Config, norm="layer"):
    return kind(
        **SIZES,
        conv_dim=[8, 16],
        conv_stride=[8, 8],
        conv_kernel=[16, 8],
        feat_extract_norm=norm,
        do_stable_layer_norm=norm == "layer",
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    )


def whisper_config():
    return hf.WhisperConfig(
        d_model=16,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=16,
        max_source_positions=50,
        max_target_positions=16,
        vocab_size=60,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )


def _waves(rate=RATE):
    return hf.Wav2Vec2FeatureExtractor(sampling_rate=rate, return_attention_mask=True)


MODELS = {
    "ast": lambda: (
        hf.ASTModel(ast_config()),
        hf.ASTFeatureExtractor(sampling_rate=RATE, num_mel_bins=16, max_length=48),
    ),
    "wav2vec2": lambda: (hf.Wav2Vec2Model(wav2vec2_config()), _waves()),
    "wav2vec2 base": lambda: (hf.Wav2Vec2Model(wav2vec2_config(norm="group")), _waves()),
    "hubert": lambda: (hf.HubertModel(wav2vec2_config(hf.HubertConfig)), _waves()),
    "wavlm": lambda: (hf.WavLMModel(wav2vec2_config(hf.WavLMConfig)), _waves()),
    "whisper": lambda: (
        hf.WhisperModel(whisper_config()),
        hf.WhisperFeatureExtractor(
            feature_size=16, sampling_rate=16_000, chunk_length=1, hop_length=160
        ),
    ),
}
"""By name: a model of two layers and its feature extractor."""


def save(name: str, where: Path, seed=0) -> Path:
    """A folder as `from_pretrained` reads it."""
    torch.manual_seed(seed)
    model, extractor = MODELS[name]()
    wake(model, seed).eval().save_pretrained(where)
    extractor.save_pretrained(where)
    return where
