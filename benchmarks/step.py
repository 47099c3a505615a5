"""Peak memory above the weights and time of one training step, every method in its own process.

    python benchmarks/step.py

ViT-S/16, batch 16, 224 px, fp32, random weights (they change neither memory nor time). On CPU the
measured processes run with glibc told to give memory back; without that, peaks wander threefold.
Rows: forward-only, linear, full, full + checkpointing, LoRA r8 (PEFT), LoRA + checkpointing,
ms-swift's ResTuning (when installed), and ours. Beside the peak stand the bytes that autograd
saves for backward. Times are medians over `--steps` steps after three warm-ups; every ratio is
against forward-only of the same run. Ratios of time that are claimed come from one more process,
in which forward-only, both of ours and LoRA take turns.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

import images
import rivals
from common import (
    KEEP,
    apart,
    arguments,
    in_turns,
    paired,
    peak_of,
    saved_bytes,
    seconds,
    spread,
    started,
    target,
    write,
)

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
PAIRED = ("forward-only", "res-tuning-bypass", "res-tuning", "lora")
"""Run in turns in one more process: ratios of times across processes wander by a tenth."""

CLASSES = 100
MEMORY = "peak_bytes_above_weights"


def build(mode: str, name: str, device: str) -> Any:
    """The module whose step is measured, on a timm model."""
    import timm
    import torch

    torch.manual_seed(0)
    classes = 0 if mode in (*OURS, "forward-only") else CLASSES
    # A billion weights are drawn on a GPU in a moment, on a CPU in a minute.
    with torch.device(device):
        model = timm.create_model(name, num_classes=classes)
    if mode == "forward-only":
        return model.eval().requires_grad_(False)
    if mode in OURS:
        import restuning

        host = restuning.Host(model, images.batch_of(model, 1, device))
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


class Step:
    """One training step of a mode (a forward for forward-only), on a batch of the given size."""

    def __init__(self, mode: str, args: argparse.Namespace) -> None:
        import timm
        import torch

        self.mode, self.module = mode, build(mode, args.model, args.device)
        self.trained = rivals.trained(self.module)
        shape = timm.get_pretrained_cfg(args.model).input_size
        self.x = torch.randn(args.batch, *shape, device=args.device)
        self.y = torch.randint(CLASSES, (args.batch,), device=args.device)
        self.optimiser = torch.optim.AdamW(self.trained, lr=1e-3) if self.trained else None

    def loss(self, size: int | None = None) -> Any:
        """Of the batch, or of its first images."""
        import torch
        import torch.nn.functional as F  # noqa: N812

        if self.optimiser is None:
            with torch.no_grad():
                return self.module(self.x[:size]).sum()
        return F.cross_entropy(self.module(self.x[:size]), self.y[:size])

    def __call__(self, size: int | None = None) -> None:
        """Make the step."""
        value = self.loss(size)
        if self.optimiser is not None:
            value.backward()
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)


def measure(args: argparse.Namespace, mode: str) -> dict[str, Any]:
    """One mode, measured in this process."""
    step = Step(mode, args)

    def twice() -> None:
        step()
        step()

    # One image first: lazy initialisations and the optimiser's state are not the step's memory.
    step(1)
    peak = peak_of(twice, args.device)
    times = [seconds(step, args.device) for _ in range(args.steps)]
    saved = saved_bytes(step.loss, list(step.module.parameters())) if step.trained else 0
    return {
        "mode": mode,
        "peak_bytes_above_weights": peak,
        "saved_for_backward_bytes": saved,
        "step_seconds": spread(times),
        "trained_parameters": sum(p.numel() for p in step.trained),
    }


def in_one_process(args: argparse.Namespace) -> dict[str, Any]:
    """Steps of the modes that are compared in time, in turns."""
    times = in_turns(
        {mode: Step(mode, args) for mode in PAIRED if mode in args.modes}, args.steps, args.device
    )
    return {
        "seconds": {mode: spread(values) for mode, values in times.items()},
        "over_forward": {m: paired(t, times["forward-only"]) for m, t in times.items()},
        "res_tuning_over_lora": paired(times["res-tuning"], times["lora"])
        if {"res-tuning", "lora"} <= set(times)
        else None,
    }


def options() -> argparse.ArgumentParser:
    """What can be asked for."""
    parser = arguments(__doc__, __file__)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--modes", nargs="*", default=MODES)
    return parser


def ratio(
    rows: Mapping[str, Mapping[str, Any]], mode: str, base: str, key: str = MEMORY
) -> float | None:
    """A value of one mode over that of another; None where one was not measured."""
    if mode not in rows or base not in rows:
        return None
    return rows[mode][key] / rows[base][key]


def claims(rows: Mapping[str, Mapping[str, Any]], turns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Targets, of rows by mode and of what ran in turns."""
    over = turns.get("over_forward", {}).get("res-tuning-bypass", {})
    return [
        target(
            "live bypass, peak memory over forward-only",
            ratio(rows, "res-tuning-bypass", "forward-only"),
            1.12,
        ),
        target("live bypass, step time over forward-only, in turns", over.get("median"), 1.1),
        target("Res-Tuning, peak memory over PEFT LoRA", ratio(rows, "res-tuning", "lora"), 1.0),
        target(
            "Res-Tuning, step time over PEFT LoRA, in turns",
            (turns.get("res_tuning_over_lora") or {}).get("median"),
            1.0,
        ),
    ]


def main() -> None:
    """Measure all modes and write the JSON."""
    args = started(options())
    if args.one:
        one = in_one_process(args) if args.one == "in turns" else measure(args, args.one)
        print(json.dumps(one))
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
            f"{row['step_seconds']['median']:.3f} s",
            flush=True,
        )
    by_mode = {row["mode"]: row for row in rows}
    for row in rows:
        row["memory_over_forward"] = ratio(by_mode, row["mode"], "forward-only")
    turns = apart(args, "in turns", KEEP)
    write(
        args,
        f"{args.model} at its own size, fp32, batch {args.batch}, one AdamW step",
        batch=args.batch,
        rows=rows,
        in_turns=turns,
        not_measured=skipped,
        targets=claims(by_mode, turns),
    )


if __name__ == "__main__":
    main()
