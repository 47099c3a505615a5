"""JPEG files decoded whole and scaled (`--scaled-jpeg`): time, class tokens, and what ridge makes of them.

    RESTUNING_DATA=FOLDER python benchmarks/decode.py --threads 1

Drawn photographs (noise whose spectrum falls as that of photographs does, with objects of sharp edges in front and noise of a
sensor; JPEG of quality 90) of three sizes, prepared for ViT-Ti/16 at 224. Class tokens are those of the weights in FOLDER,
and of random ones without; beside their difference stands that of the same photographs stored at quality 85, and that of
other photographs. Ridge is trained and judged on one task of FOLDER whose images are enlarged, get noise of a sensor, and are
stored as JPEG again. Times are those of a processor, which others on the machine do not lengthen. torchvision's decoder is timed beside Pillow's, each decoding whole and nothing else.
"""

from __future__ import annotations

import io
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import HERE, arguments, spread, started, target, write
from PIL import Image

SIZES = ((4000, 3000), (2000, 1500), (1000, 750))
MODEL = "timm:vit_tiny_patch16_224"
TASK = "rsscn7"
SENSOR = 6.0
"""Deviation of a sensor's noise, of 255."""


def draw_photograph(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Large forms, fine ones and edges."""
    whole = np.zeros((height, width, 3), np.float32)
    side, weight = 4, 1.0
    # Octaves of noise, each as strong as it is coarse: power falls with the square of frequency.
    while side < 2 * width:
        coarse = rng.integers(0, 256, (max(2, side * height // width), side, 3), dtype=np.uint8)
        layer = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        whole += weight * (np.asarray(layer, np.float32) - 127.5)
        side, weight = side * 2, weight / 2
    y, x = np.mgrid[:height, :width].astype(np.float32)
    for _ in range(12):
        radius = rng.uniform(0.02, 0.2) * width
        across, down = rng.uniform(0, width), rng.uniform(0, height)
        inside = (x - across) ** 2 + (rng.uniform(0.5, 2) * (y - down)) ** 2 < radius**2
        whole[inside] = whole[inside] * 0.5 + rng.uniform(-100, 100, 3)
    return add_noise(rng, 127.5 + 0.7 * whole)


def add_noise(rng: np.random.Generator, pixels: np.ndarray) -> Image.Image:
    """What a sensor adds."""
    noisy = pixels + SENSOR * rng.standard_normal(pixels.shape, np.float32)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, quality: int = 90) -> bytes:
    """As JPEG, its colours at half the sides as cameras store them."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def measure_size(
    args: Any, backbone: Any, forward: Callable, size: tuple[int, int]
) -> dict[str, Any]:
    """Times of one size, and differences of its class tokens."""
    from dataclasses import replace

    import torch

    from restuning.data import read_image

    rng = np.random.default_rng(0)
    drawn = [draw_photograph(rng, *size) for _ in range(args.images)]
    files, again = [encode(each) for each in drawn], [encode(each, 85) for each in drawn]
    plain = backbone.preprocessing
    scaled = replace(plain, scaled_jpeg=True)

    def prepare(contents: list[bytes], how: Any) -> torch.Tensor:
        return torch.stack([how.image(read_image(each, least=how.least)) for each in contents])

    runs = {
        "decoded": lambda: [read_image(each) for each in files],
        "decoded scaled": lambda: [read_image(each, least=scaled.least) for each in files],
        "prepared": lambda: prepare(files, plain),
        "prepared scaled": lambda: prepare(files, scaled),
        "Pillow alone": lambda: [Image.open(io.BytesIO(each)).load() for each in files],
    }
    if decode := torchvision_decoder():
        tensors = [torch.frombuffer(bytearray(each), dtype=torch.uint8) for each in files]
        runs["torchvision alone"] = lambda: [decode(each) for each in tensors]
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(args.rounds + 1):
        for name, run in runs.items():
            began = time.process_time()
            run()
            # The first round warms up.
            if number:
                times[name].append(time.process_time() - began)
    whole = forward(prepare(files, plain))
    others = {
        "scaled": forward(prepare(files, scaled)),
        "quality 85": forward(prepare(again, plain)),
        "another photograph": whole.roll(1, 0),
    }
    return {
        "size": f"{size[0]} x {size[1]}",
        "decoded to": " x ".join(map(str, read_image(files[0], least=scaled.least).size)),
        "milliseconds of a processor": {
            name: spread([1000 * each / args.images for each in several])
            for name, several in times.items()
        },
        "times as fast, prepared": spread(
            [a / b for a, b in zip(times["prepared"], times["prepared scaled"], strict=True)]
        ),
        "relative difference of class tokens": {
            name: spread(((other - whole).norm(dim=1) / whole.norm(dim=1)).tolist())
            for name, other in others.items()
        },
    }


def torchvision_decoder() -> Callable | None:
    """Its whole decoding of a JPEG; None where it has none."""
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except (ImportError, RuntimeError):
        return None
    return lambda each: decode_jpeg(each, ImageReadMode.RGB)


def enlarge(args: Any, source: Path, folder: Path) -> Path:
    """A task with the same images, larger: their shorter sides are `--side` pixels."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for split in ("train800.txt", "test.txt"):
        lines = (source / split).read_text().split("\n")
        lines = [line for line in lines if line][: args.rows]
        (folder / split).write_text("\n".join(lines) + "\n")
        for line in lines:
            image = Image.open(source / line.split()[0]).convert("RGB")
            times = args.side / min(image.size)
            size = tuple(round(times * each) for each in image.size)
            larger = image.resize(size, Image.Resampling.BICUBIC)
            noisy = add_noise(rng, np.asarray(larger, np.float32))
            (folder / line.split()[0]).write_bytes(encode(noisy))
    return folder


def train_ridge(args: Any, data: Path, weights: Path, root: Path) -> dict[str, Any]:
    """Accuracy of ridge by how images were decoded for training and for the test."""
    import restuning
    from restuning.data import DataOptions
    from restuning.training.evaluate_task import evaluate_task

    found = {}
    for name, scaled in (("whole", False), ("scaled", True)):
        result = restuning.train(
            str(data),
            backbone=MODEL,
            weights=weights,
            method="ridge",
            scaled_jpeg=scaled,
            out=root / name,
            store=root / "stores",
            device=args.device,
            report=False,
            progress=False,
        )
        found[f"trained and tested {name}"] = 100 * result.metrics["test_accuracy"]
    predictor = restuning.Predictor.load(root / "whole")
    crossed = evaluate_task(predictor, str(data), DataOptions(scaled_jpeg=True))
    found["trained whole, tested scaled"] = 100 * crossed["accuracy"]
    return found


def main() -> None:
    """Measure, and write the JSON."""
    parser = arguments(__doc__, __file__)
    parser.add_argument("--images", type=int, default=6, help="photographs of each size")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", type=int, default=1500, help="of enlarged images")
    parser.add_argument("--rows", type=int, default=500, help="of each split of the task, at most")
    args = started(parser)
    import torch

    import restuning

    shared = Path(os.environ.get("RESTUNING_DATA", HERE.parent.parent / "shared" / "data"))
    weights = shared / "weights" / "vit_tiny_patch16_224.safetensors"
    real = weights.exists()
    backbone = restuning.load_backbone(MODEL, weights=weights if real else None, random=not real)
    model = backbone.model.eval().to(args.device)

    @torch.no_grad()
    def forward(inputs: torch.Tensor) -> torch.Tensor:
        return model.forward_features(inputs.to(args.device))[:, 0].cpu()

    rows = [measure_size(args, backbone, forward, size) for size in SIZES]
    accuracy: dict[str, Any] = {}
    missing = {}
    if real and (shared / "vtab" / TASK).is_dir():
        with tempfile.TemporaryDirectory() as root:
            data = enlarge(args, shared / "vtab" / TASK, Path(root) / TASK)
            accuracy = train_ridge(args, data, weights, Path(root))
    else:
        missing["ridge on a real task"] = "no weights or no task in RESTUNING_DATA"
    first = rows[0]
    lost = None
    if accuracy:
        lost = accuracy["trained and tested whole"] - accuracy["trained and tested scaled"]
    differences = first["relative difference of class tokens"]
    write(
        args,
        f"JPEG files decoded whole and scaled for {MODEL}, {'real' if real else 'random'} weights",
        images=args.images,
        rows=rows,
        ridge={"task": TASK, "shorter side": args.side, "accuracy, %": accuracy},
        not_measured=missing,
        targets=[
            target(
                "12 megapixels prepared, times as fast scaled",
                first["times as fast, prepared"]["median"],
                2.0,
                at_least=True,
            ),
            target(
                "difference of class tokens over that of quality 85",
                differences["scaled"]["median"] / differences["quality 85"]["median"],
                1.0,
            ),
            target("points of ridge's accuracy lost, trained and tested scaled", lost, 1.0),
        ],
    )


if __name__ == "__main__":
    main()
