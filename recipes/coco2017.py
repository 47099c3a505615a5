"""The paper's text-to-image experiment: Stable Diffusion v1.5 tuned on COCO2017, and its FID.

    python recipes/coco2017.py --coco DIR --pipeline DIR [--method res-tuning-bypass]

It prints the FID of ours beside the published one; `--method none` judges the pipeline as it is, which
says how far apart the two ways of judging are.

Needs what cannot be shipped, and says so without it:
  COCO2017   train2017.zip (18 GB), val2017.zip (0.8 GB) and annotations_trainval2017.zip from
             https://cocodataset.org, unpacked into --coco
  weights    a folder that holds Stable Diffusion v1.5 as diffusers keeps it
  Inception  of FID, and CLIP for the CLIP score, fetched at first use

The published figures are those of `recipes/paper/published.json`. Batch, learning rate, epochs,
resolution, guidance, sampler and the number of images are not printed: those below are ours, and every
result holds its whole protocol. Expected hardware: one
GPU of 24 GB for the bypass at 512 pixels and batch 16 (`benchmarks/diffusion.py` counts it).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import restuning
from restuning import Host, methods
from restuning.backbones.diffusion import load_text_to_image
from restuning.diffusion import (
    DenoiserSettings,
    DenoiserTraining,
    JudgingProtocol,
    Objective,
    Pairs,
    encode,
    judge_images,
    train_denoiser,
)

RANKS = {"res-tuning-bypass": 64, "res-tuning[mha=adapter,ffn=adapter]": 50, "adapter": 100}
PUBLISHED = Path(__file__).parent / "paper" / "published.json"
ROWS = {
    "none": "SD v1.5",
    "adapter": "Adapter",
    "res-tuning[mha=adapter,ffn=adapter]": "Res-Tuning",
    "res-tuning-bypass": "Res-Tuning-Bypass",
}
"""The published row of each method that has one."""


def coco(folder: Path, split: str, limit: int | None = None) -> Pairs:
    """A split, the first caption of every image, in the order of image numbers."""
    notes = json.loads((folder / "annotations" / f"captions_{split}2017.json").read_text())
    files = {i["id"]: i["file_name"] for i in notes["images"]}
    captions: dict[int, str] = {}
    for row in notes["annotations"]:
        captions.setdefault(row["image_id"], row["caption"].strip())
    chosen = sorted(captions)[:limit]
    return Pairs(
        tuple(files[i] for i in chosen),
        tuple(captions[i] for i in chosen),
        tuple(folder / f"{split}2017" / files[i] for i in chosen),
    )


def missing(args: argparse.Namespace) -> list[str]:
    """What has to be downloaded first."""
    wanted = {
        args.coco / "train2017": "train2017.zip from https://cocodataset.org",
        args.coco / "val2017": "val2017.zip from https://cocodataset.org",
        args.coco / "annotations" / "captions_train2017.json": "annotations_trainval2017.zip",
        args.coco / "annotations" / "captions_val2017.json": "annotations_trainval2017.zip",
        args.pipeline / "model_index.json": "Stable Diffusion v1.5 in the form of diffusers",
    }
    return [f"{path}: {what}" for path, what in wanted.items() if not path.exists()]


def pixels(pairs: Pairs, size: int, batch: int) -> Iterator[Tensor]:
    """Bytes of the reference."""
    for start in range(0, len(pairs), batch):
        rows = range(start, min(start + batch, len(pairs)))
        yield _bytes(torch.stack([pairs.image(i, size) for i in rows]) / 2 + 0.5)


def _bytes(images: Tensor) -> Tensor:
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def beside_published(method: str, scores: dict[str, float], parameters: int | None) -> str:
    """Ours / published, for FID (lower is better) and the trained parameters; `-` where there is none."""
    table = json.loads(PUBLISHED.read_text(encoding="utf-8"))["coco2017"]
    row = table["rows"].get(ROWS.get(method, ""), [None] * len(table["columns"]))
    fid, size = (row[table["columns"].index(name)] for name in ("FID", "params M"))
    ours = scores.get("FID")
    both = ours is not None and fid is not None
    verdict = f", {'reached' if round(ours, 2) <= fid else 'MISSED'}" if both else ""
    shown = "-" if parameters is None else f"{parameters / 1e6:.2f}"
    return (
        f"ours / published, {method}\n"
        f"FID                   {_figure(ours)} / {_figure(fid)}{verdict}\n"
        f"trained parameters, M {shown} / {_figure(size)}\n"
        f"Published: {table['source']}."
    )


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--coco", type=Path, required=True)
    parser.add_argument("--pipeline", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/coco2017"))
    parser.add_argument("--method", default="res-tuning-bypass", help="'none' judges the pipeline")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--images", type=int, default=5000, help="captions of val2017")
    parser.add_argument("--sample-steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--clip", default="openai/clip-vit-base-patch16")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, generate, judge."""
    args = read_arguments(arguments)
    lacking = missing(args)
    if lacking:
        sys.exit("this recipe needs files that are not here:\n  " + "\n  ".join(lacking))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parts = load_text_to_image(args.pipeline, device=device, size=args.size)
    example, named = parts.example
    more: dict[str, Any] = dict(named)
    host = Host(parts.denoiser, *example, **more)
    task, folder = None, args.out / args.method
    if args.method != "none":
        torch.manual_seed(0)
        task = methods.build(args.method, host, rank=RANKS.get(args.method, 50)).to(device)
        data = encode(coco(args.coco, "train"), parts, args.size, args.out / "latents")
        settings = DenoiserSettings(
            steps=args.steps,
            batch_size=args.batch_size,
            lr=1e-4,
            warmup_steps=500,
            checkpoint_every=500,
            precision="bf16" if device == "cuda" else "no",
        )
        objective = Objective(
            parts.objective, parts.alphas, time_scale=parts.conditioning.time_scale
        )  # type: ignore[arg-type]
        train_denoiser(
            DenoiserTraining(
                host,
                {"coco": task},
                data,
                objective,
                settings,
                folder,
                parts.fixed,
                backbone=f"diffusers:{args.pipeline}",
            )
        )
    reference = coco(args.coco, "val", args.images)

    def generated() -> Iterator[tuple[Tensor, list[str]]]:
        for start in range(0, len(reference), args.batch_size):
            captions = list(reference.captions[start : start + args.batch_size])
            images = parts.generate(
                captions,
                steps=args.sample_steps,
                guidance=args.guidance,
                seed=start,
                using=host.using(task),
            )
            yield _bytes(images), captions

    result = judge_images(
        pixels(reference, args.size, args.batch_size),
        generated(),
        JudgingProtocol(
            f"{args.pipeline} {args.method}",
            "COCO2017 val, first captions",
            reference.digest(),
            args.size,
            "middle square, Pillow Lanczos",
            type(parts.pipeline.scheduler).__name__,
            args.sample_steps,
            args.guidance,
            0,
        ),
        clip=args.clip,
    )
    folder.mkdir(parents=True, exist_ok=True)
    result["restuning"] = restuning.__version__
    (folder / "scores.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["scores"], indent=1))
    print(
        beside_published(
            args.method, result["scores"], None if task is None else task.trainable_parameters()
        )
    )


if __name__ == "__main__":
    main()
