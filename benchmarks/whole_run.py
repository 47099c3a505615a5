"""A whole run in the form of VTAB-1K: 1000 training images, 100 epochs, ViT-B/16, batch 64.

    python benchmarks/whole_run.py

Ours is run for real, from JPEG files to a saved task: sites, store (decode, backbone, disk), 100
epochs from it, all in fp32; once more with features computed in bf16 where the processor has it.
Rivals are measured for a few training steps on tensors that are ready (no decoding, which favours
them) and extrapolated to 100 epochs: PEFT LoRA r8, ms-swift's bypass (when installed), full
fine-tuning. Linear probing by the common recipe is one pass for features of the last layer
(extrapolated from batches) and scikit-learn's logistic regression over a grid of C (run for real on
random features). Weights are random, which changes no time. Every row is a process of its own, and
times bare forwards beside it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import images
import rivals
from common import KEEP, apart, arguments, seconds, spread, started, target, write

CLASSES = 100
GRID = [10.0**e for e in range(-3, 4)]
"""C of logistic regression: seven decades, as CLIP's recipe starts."""
OURS = {"cached bypass": "fp32", "cached bypass, bf16 features": "bf16"}
RIVALS = ("PEFT LoRA r8", "ms-swift bypass", "full fine-tuning")
PROBE = "linear probing, common recipe"


def forwards(args: Any, model: Any) -> list[float]:
    """Seconds an image of bare forwards."""
    import torch

    x = images.batch_of(model, args.batch, args.device)
    with torch.no_grad():
        return [seconds(lambda: model(x), args.device) / args.batch for _ in range(args.steps)]


def ours(args: Any, precision: str, root: Path) -> dict[str, Any]:
    """From image files to a saved task."""
    import torch

    import restuning
    from restuning import FitSettings, Host, methods
    from restuning.data import load_data
    from restuning.features import Cached, StoreOptions, open_or_build
    from restuning.training import fit

    folder = images.make(root / "images", args.images, 0, CLASSES)
    torch.manual_seed(0)
    backbone = restuning.load_backbone(f"timm:{args.model}", random=True)
    backbone.model.to(args.device)
    forwards(args, backbone.model)
    before = forwards(args, backbone.model)
    parts: dict[str, float] = {}
    start = at = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal at
        parts[name] = time.perf_counter() - at
        at = time.perf_counter()

    host = Host(backbone.model, *(e.to(args.device) for e in backbone.example))
    task = methods.build("res-tuning-bypass", host, num_classes=CLASSES).to(args.device)
    data = load_data(str(folder), backbone)
    lap("sites, task, data set")
    kept = open_or_build(
        host,
        backbone,
        data,
        task.needs(host.readout_rule),
        StoreOptions(root / "stores", precision=precision),
    )
    assert kept is not None
    lap("store")
    fed = kept.data(data, final=True)
    fit(
        Cached(host, task, kept.store),
        fed.train,
        settings=FitSettings(epochs=args.epochs),
        out=root / "run",
        collate=fed.collate,
        progress=False,
    )
    lap("training")
    restuning.save(task, host, root / "x.task", backbone=backbone.name)
    lap("save")
    total = time.perf_counter() - start
    # Before and after: a machine that slows in between must not flatter us.
    bare = spread([*before, *forwards(args, backbone.model)])
    return {
        "seconds": total,
        "parts": parts,
        "extrapolated": False,
        "forward_seconds_per_image": bare,
        "over_one_pass": total / (bare["median"] * args.images),
    }


def rival(args: Any, name: str) -> dict[str, Any]:
    """A few steps, extrapolated."""
    import timm
    import torch
    import torch.nn.functional as F  # noqa: N812

    torch.manual_seed(0)
    model = timm.create_model(args.model, num_classes=CLASSES).to(args.device)
    with torch.no_grad():
        model(images.batch_of(model, 1, args.device))
    bare = forwards(args, model.eval())[1:]
    make = {
        "PEFT LoRA r8": rivals.lora,
        "ms-swift bypass": rivals.swift,
        "full fine-tuning": rivals.full,
    }[name]
    x = images.batch_of(model, args.batch, args.device)
    model = make(model).to(args.device)
    optimiser = torch.optim.AdamW(rivals.trained(model), lr=1e-3)
    y = torch.randint(CLASSES, (args.batch,), device=args.device)

    def step() -> None:
        F.cross_entropy(model(x), y).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    step()
    each = spread([seconds(step, args.device) / args.batch for _ in range(args.steps)])
    return {
        "seconds": each["median"] * args.images * args.epochs,
        "extrapolated": True,
        "step_seconds_per_image": each,
        "forward_seconds_per_image": spread(bare),
        "trained_parameters": sum(p.numel() for p in rivals.trained(model)),
    }


def probing(args: Any) -> dict[str, Any]:
    """One pass for features, extrapolated, and logistic regressions, run."""
    import numpy as np
    import timm
    from sklearn.linear_model import LogisticRegression

    model = timm.create_model(args.model, num_classes=0).to(args.device).eval()
    bare = spread(forwards(args, model)[1:])
    rng = np.random.default_rng(0)
    x = rng.standard_normal((args.images, model.num_features)).astype(np.float32)
    y = np.arange(args.images) % CLASSES
    cut = args.images * 4 // 5
    start = time.perf_counter()
    scores = [
        LogisticRegression(C=c, max_iter=1000).fit(x[:cut], y[:cut]).score(x[cut:], y[cut:])
        for c in GRID
    ]
    LogisticRegression(C=GRID[int(np.argmax(scores))], max_iter=1000).fit(x, y)
    regression = time.perf_counter() - start
    return {
        "seconds": bare["median"] * args.images + regression,
        "extrapolated": True,
        "parts": {"features": bare["median"] * args.images, "regressions": regression},
        "forward_seconds_per_image": bare,
    }


def measure(args: Any, name: str) -> dict[str, Any]:
    """One row, in this process."""
    if name in OURS:
        with tempfile.TemporaryDirectory() as root:
            return ours(args, OURS[name], Path(root))
    return probing(args) if name == PROBE else rival(args, name)


def claims(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Targets, of the rows that were measured."""
    found = {row["method"]: row for row in rows if "seconds" in row}

    def times(rival: str, mine: str) -> float | None:
        if rival not in found or mine not in found:
            return None
        return found[rival]["seconds"] / found[mine]["seconds"]

    cached, half = OURS
    return [
        target(
            "cached bypass, times faster than PEFT LoRA (all fp32)",
            times("PEFT LoRA r8", cached),
            200,
            at_least=True,
        ),
        target(
            "cached bypass, times faster than ms-swift's bypass (all fp32)",
            times("ms-swift bypass", cached),
            100,
            at_least=True,
        ),
        target(
            "with bf16 features, times faster than PEFT LoRA (fp32)",
            times("PEFT LoRA r8", half),
            300,
            at_least=True,
        ),
        target(
            "cached bypass over one pass of bare forwards",
            found.get(cached, {}).get("over_one_pass"),
            1.1,
        ),
    ]


def options() -> argparse.ArgumentParser:
    """What can be asked for."""
    parser = arguments(__doc__, __file__)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16, help="of the rivals' measured steps")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rows", nargs="*", default=[*OURS, *RIVALS, PROBE])
    return parser


def main() -> None:
    """Measure all rows and write the JSON."""
    args = started(options())
    if args.one:
        print(json.dumps(measure(args, args.one)))
        return
    rows = []
    for name in args.rows:
        row = {"method": name, **apart(args, name, KEEP)}
        rows.append(row)
        print(f"{name:32s} {row.get('seconds', row.get('not_measured'))}", flush=True)
    write(
        args,
        f"{args.images} images, {args.epochs} epochs, {args.model}: the whole run",
        images=args.images,
        epochs=args.epochs,
        rows=rows,
        targets=claims(rows),
    )


if __name__ == "__main__":
    main()
