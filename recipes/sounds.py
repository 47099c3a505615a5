"""Sounds that are drawn, whose truth is known, on small backbones with random weights.

    python recipes/sounds.py

Three columns of answers on the same sounds: the pitch class (one of four), whether a chirp rises or falls, and how many
bursts there are (a number). A small AST and a small wav2vec2 are made from their configs with random weights, for no
pretrained ones were at hand: what the recipe shows is that sounds run through everything, from files to calibrated answers,
and how far methods beside a backbone that has learnt nothing come; it says nothing about pretrained ones. Trained with `linear`, `ridge` and
`res-tuning-bypass`, on features that are stored once; but the bypass beside wav2vec2, which reads all tokens of sounds of any
length, runs the backbone in every epoch and takes most of the time. Beside the figures of the test split stands that of the best
constant answer. Writes `runs/sounds/sounds.json` (that of the page is `recipes/sounds.json`), with the versions and the seconds of each run.

Expected: on pitch `ridge` far above the constant beside both, `linear` above it; bursts, which are counted along time, by `ridge` beside
the AST alone. There are 24 test sounds: a figure is good to a tenth. In eight epochs the bypass learns little.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import restuning

RATE = 16_000
SECONDS = 0.9
PITCHES = {"a": 220.0, "c": 523.25, "e": 1318.5, "g": 3136.0}
MOST_BURSTS = 6
COLUMNS = ("pitch", "chirp", "bursts")
METHODS = ("linear", "ridge", "res-tuning-bypass")
ROWS, EPOCHS = 120, 8
"""Sounds that are drawn, and epochs of methods that are trained in steps: two minutes on two processor cores."""


def draw(pitch: float, rises: bool, bursts: int, random: np.random.Generator) -> np.ndarray:
    """A chirp of an octave around a pitch, cut into bursts, in noise and at any loudness."""
    at = np.arange(round(SECONDS * RATE)) / RATE
    octaves = (at / SECONDS - 0.5) * (1 if rises else -1)
    phase = 2 * np.pi * np.cumsum(pitch * 2**octaves * random.uniform(0.97, 1.03)) / RATE
    gate = np.sin(2 * np.pi * bursts * at / SECONDS) > 0
    tone = np.sin(phase + random.uniform(0, 2 * np.pi)) * gate
    noise = 0.05 * random.standard_normal(len(at))
    return (random.uniform(0.2, 0.8) * (tone + noise)).astype(np.float32)


def write_table(folder: Path, rows: int, seed: int = 0) -> Path:
    """`table.csv` of drawn sounds and the three answers to each, and the files beside it."""
    import soundfile

    random = np.random.default_rng(seed)
    (folder / "sounds").mkdir(parents=True, exist_ok=True)
    lines = [",".join(("audio", *COLUMNS))]
    for number in range(rows):
        name = list(PITCHES)[random.integers(len(PITCHES))]
        rises, bursts = bool(random.integers(2)), int(random.integers(1, MOST_BURSTS + 1))
        file = f"sounds/{number:04}.wav"
        soundfile.write(folder / file, draw(PITCHES[name], rises, bursts, random), RATE)
        lines.append(f"{file},{name},{'rises' if rises else 'falls'},{bursts}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    return folder / "table.csv"


def make_backbones(folder: Path) -> dict[str, str]:
    """Folders of a small AST and a small wav2vec2 with random weights, by name."""
    import transformers as hf

    sizes = {
        "hidden_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 192,
    }
    torch.manual_seed(0)
    ast = hf.ASTConfig(**sizes, max_length=96, num_mel_bins=64)
    waves = hf.Wav2Vec2Config(
        **sizes,
        conv_dim=[64] * 5,
        conv_stride=[5, 2, 2, 2, 4],
        conv_kernel=[10, 3, 3, 3, 4],
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        num_conv_pos_embeddings=32,
        num_conv_pos_embedding_groups=4,
    )
    made = {
        "ast": (
            hf.ASTModel(ast),
            hf.ASTFeatureExtractor(num_mel_bins=64, max_length=96, sampling_rate=RATE),
        ),
        "wav2vec2": (
            hf.Wav2Vec2Model(waves),
            hf.Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=True),
        ),
    }
    for name, (model, extractor) in made.items():
        model.eval().save_pretrained(folder / name)
        extractor.save_pretrained(folder / name)
    return {name: f"hf:{folder / name}" for name in made}


def find_constant(table: Path, column: str, backbone: Any) -> float:
    """The figure of the best answer without listening: the share of the commonest class, or 0 for R2."""
    data = restuning.load_data(table, backbone, audio="audio", label=column)
    if data.problem.kind == "regression":
        return 0.0
    labels = [data.test.label(n) for n in range(len(data.test))]
    return max(map(labels.count, set(labels))) / len(labels)


def main() -> None:
    """Every backbone with every method; a line each, and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--out", type=Path, default=Path("runs/sounds"))
    parser.add_argument("--methods", nargs="*", default=METHODS)
    arguments = parser.parse_args()
    table = write_table(arguments.out / "data", arguments.rows)
    results: dict[str, Any] = {}
    for name, place in make_backbones(arguments.out / "backbones").items():
        backbone = restuning.load_backbone(place)
        constants = {c: find_constant(table, c, backbone) for c in COLUMNS}
        for method in arguments.methods:
            start = time.perf_counter()
            steps = {} if method == "ridge" else {"epochs": arguments.epochs}
            found = restuning.train(
                table,
                backbone=backbone,
                method=method,
                audio="audio",
                label=list(COLUMNS),
                store=arguments.out / "features",
                out=arguments.out / f"{name}-{method}",
                report=False,
                **steps,
            )
            rows = {row["column"]: row for row in found.rows()}
            results[f"{name}, {method}"] = {
                "columns": {c: {"constant": constants[c], **rows[c]} for c in COLUMNS},
                "seconds": time.perf_counter() - start,
            }
            told = {c: rows[c].get("test_accuracy", rows[c].get("test_r2")) for c in COLUMNS}
            figures = (f"{c} {value:.3f} ({constants[c]:.3f})" for c, value in told.items())
            print(f"{name:9} {method:18} {', '.join(figures)}")
    print("random weights: these figures say nothing about encoders that have learnt to hear")
    report = {
        "command": f"python recipes/sounds.py --rows {arguments.rows} --epochs {arguments.epochs}",
        "rows": arguments.rows,
        "epochs": arguments.epochs,
        "weights": "random",
        "versions": {each: version(each) for each in ("torch", "transformers", "soundfile")},
        "machine": platform.machine(),
        "results": results,
    }
    (arguments.out / "sounds.json").write_text(json.dumps(report, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
