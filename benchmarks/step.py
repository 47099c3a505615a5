"""Peak memory above the weights and time of one training step, every method in its own process.

    python benchmarks/step.py

ViT-S/16, batch 16, 224 px, fp32, random weights (they change neither memory nor time). On CPU the
measured processes run with glibc told to give memory back; without that, peaks wander threefold.
Rows: forward-only, linear, full, full + checkpointing, LoRA r8 (PEFT), LoRA + checkpointing,
ms-swift's ResTuning (when installed), and ours. Beside the peak stand the bytes that autograd
saves for backward. Times are medians over `--steps` steps after two warm-ups; every ratio is
against forward-only of the same run.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import rivals
from common import apart, arguments, peak_of, saved_bytes, seconds, spread, started, target, write

MODES = [
    "forward-only",
    "linear",
    "full",
    "full+checkpointing",
    "lora",
    "lora+checkpointing",
    "ms-swift-restuning",
    "res-tuning",
    "res-tuning-bypass",
]
OURS = ("res-tuning", "res-tuning-bypass")
CLASSES = 100


def build(mode: str, device: str) -> Any:
    """The module whose step is measured."""
    import timm
    import torch

    torch.manual_seed(0)
    classes = 0 if mode in (*OURS, "forward-only") else CLASSES
    model = timm.create_model("vit_small_patch16_224", num_classes=classes).to(device)
    if mode == "forward-only":
        return model.eval().requires_grad_(False)
    if mode in OURS:
        import restuning

        host = restuning.Host(model, torch.randn(1, 3, 224, 224, device=device))
        task = restuning.methods.build(mode, host, num_classes=CLASSES).to(device)
        return restuning.Tuned(host, task).train()
    checkpointing = mode.endswith("checkpointing")
    if mode.startswith("lora"):
        return rivals.lora(model, checkpointing=checkpointing).to(device)
    if mode == "ms-swift-restuning":
        return rivals.swift(model).to(device)
    if mode == "linear":
        return rivals.linear(model)
    return rivals.full(model, checkpointing=checkpointing)


def measure(args: argparse.Namespace, mode: str) -> dict[str, Any]:
    """One mode, measured in this process."""
    import torch
    import torch.nn.functional as F  # noqa: N812

    device = args.device
    module = build(mode, device)
    trained = rivals.trained(module)
    x = torch.randn(args.batch, 3, 224, 224, device=device)
    y = torch.randint(CLASSES, (args.batch,), device=device)

    def loss() -> Any:
        if mode == "forward-only":
            with torch.no_grad():
                return module(x).sum()
        return F.cross_entropy(module(x), y)

    optimiser = torch.optim.AdamW(trained, lr=1e-3) if trained else None

    def step() -> None:
        value = loss()
        if optimiser is not None:
            value.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    def twice() -> None:
        step()
        step()

    # One image first: lazy initialisations and the optimiser's state are not the step's memory.
    whole, x, labels, y = x, x[:1], y, y[:1]
    step()
    x, y = whole, labels
    peak = peak_of(twice, device)
    times = [seconds(step, device) for _ in range(args.steps)]
    saved = 0 if mode == "forward-only" else saved_bytes(loss, list(module.parameters()))
    return {
        "mode": mode,
        "peak_bytes_above_weights": peak,
        "saved_for_backward_bytes": saved,
        "step_seconds": spread(times),
        "trained_parameters": sum(p.numel() for p in trained),
    }


def main() -> None:
    """Measure all modes and write the JSON."""
    parser = arguments(__doc__, __file__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--modes", nargs="*", default=MODES)
    args = started(parser)
    if args.one:
        print(json.dumps(measure(args, args.one)))
        return
    rows, skipped = [], {}
    for mode in args.modes:
        row = apart(args, mode)
        if "not_measured" in row:
            skipped[mode] = row["not_measured"]
            print(f"{mode:22s} not measured: {skipped[mode]}", flush=True)
            continue
        rows.append(row)
        print(
            f"{mode:22s} peak {row['peak_bytes_above_weights'] / 2**20:7.0f} MiB   saved "
            f"{row['saved_for_backward_bytes'] / 2**20:7.0f} MiB   step "
            f"{row['step_seconds']['median']:.3f} s", flush=True
        )  # fmt: skip
    by_mode = {row["mode"]: row for row in rows}

    def ratio(mode: str, base: str, key: str) -> float | None:
        if mode not in by_mode or base not in by_mode:
            return None
        one, other = by_mode[mode][key], by_mode[base][key]
        return one["median"] / other["median"] if isinstance(one, dict) else one / other

    for row in rows:
        row["memory_over_forward"] = ratio(row["mode"], "forward-only", "peak_bytes_above_weights")
        row["time_over_forward"] = ratio(row["mode"], "forward-only", "step_seconds")
    memory, times = "peak_bytes_above_weights", "step_seconds"
    write(
        args, f"ViT-S/16, 224 px, fp32, batch {args.batch}, one AdamW step",
        batch=args.batch, rows=rows, not_measured=skipped,
        targets=[
            target("live bypass, peak memory over forward-only",
                   ratio("res-tuning-bypass", "forward-only", memory), 1.12),
            target("live bypass, step time over forward-only",
                   ratio("res-tuning-bypass", "forward-only", times), 1.1),
            target("Res-Tuning, peak memory over PEFT LoRA",
                   ratio("res-tuning", "lora", memory), 1.0),
            target("Res-Tuning, step time over PEFT LoRA",
                   ratio("res-tuning", "lora", times), 1.0),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
