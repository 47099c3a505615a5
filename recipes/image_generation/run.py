"""Adapt small denoisers to a new style and a new concept, by every method, with real learning.

    python recipes/image_generation/run.py
    python recipes/image_generation/run.py --network dit --shifts style
    python recipes/image_generation/table.py

A base model is trained from scratch on captioned pictures (`shapes.py`), then adapted to the style
"paper" or to the concept "star" by: full, full + checkpointing, LoRA (PEFT), inline Res-Tuning and
the bypass (`adapt.py`). Every row: error of the predicted noise on held-out pictures by bucket of
time, accuracy of attributes of generated pictures against their captions, Fréchet distance on the
judge's features (FD_judge: no Inception, so it is no FID), bytes saved for backward, step time,
parameters, and samples. Rows are files of their own, so a run goes on where it was stopped.

Expected: `results.json`, and the ranges in README.md. Hardware: one CPU core,
about 80 minutes for the UNet.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import adapt
import judging
import parts
import torch

from restuning.diffusion import save_grid

FROZEN = "frozen"


def one(args: argparse.Namespace, method: str, shift: str, seed: int) -> None:
    """Train and judge one row, unless it is there."""
    network = args.network
    name = f"{network}-{shift}-{method.replace(' ', '_')}-{seed}"
    file = args.out / "rows" / f"{name}.json"
    if file.exists():
        return
    model = adapt.base(network, args.base_steps, args.out)
    if method == FROZEN:
        made, setting = adapt.Adapted(adapt.bare(model, parts.FIXED[network]), 0, 0, 0.0), None
    else:
        setting = adapt.SETTINGS[network][method]
        made = adapt.adapted(
            network,
            model,
            setting,
            judging.training_set(shift, seed),
            args.steps,
            seed,
            args.out / "tasks" / name,
        )
    found, drawn = judging.judged(
        made.denoiser, shift, args.out, count=args.held_out, samples=args.samples
    )
    row = {
        "network": network,
        "shift": shift,
        "method": method,
        "seed": seed,
        "setting": None if setting is None else vars(setting),
        "steps": args.steps,
        "base_steps": args.base_steps,
        "trained_parameters": made.parameters,
        "saved_for_backward_bytes": made.saved,
        "cpu_seconds_a_step": made.seconds,
        **found,
    }
    save_grid((drawn[:16] + 1) / 2, args.out / "samples" / f"{name}.png", 8, scale=2)
    torch.save(drawn[:16], args.out / "samples" / f"{name}.pt")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(row, indent=1) + "\n")
    print(
        f"{name}: error {found['epsilon_error']:.4f}, attributes "
        f"{found['attribute_accuracy']:.3f}, FD_judge {found['fd_judge']:.2f}, "
        f"{made.parameters:,} parameters, {made.saved / 2**20:.0f} MiB, {made.seconds:.2f} s",
        flush=True,
    )


def main() -> None:
    """Run what is missing, key rows first."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/image-generation"))
    parser.add_argument("--network", choices=list(parts.NETWORKS), default="unet")
    parser.add_argument("--base-steps", type=int, default=1600)
    parser.add_argument("--steps", type=int, default=250, help="of every adaptation")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--held-out", type=int, default=128)
    parser.add_argument("--methods", nargs="*", help="default: all; those of one seed have it so")
    parser.add_argument("--shifts", nargs="*", default=list(judging.SHIFTS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for shift in args.shifts:
            for method in args.methods or [FROZEN, *adapt.SETTINGS[args.network]]:
                if seed and method in (FROZEN, *adapt.ONE_SEED):
                    continue
                one(args, method, shift, seed)


if __name__ == "__main__":
    main()
