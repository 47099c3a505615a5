"""How the settings of `adapt.py` were chosen: short runs, judged on scenes that no row is judged on.

    python recipes/image_generation/pilots.py
    python recipes/image_generation/pilots.py --network dit

Every method is given its learning rate, inline Res-Tuning also its place (at no more parameters than
LoRA), the bypass its rank and form. Training pictures, scenes and noise differ from those of all
rows. Results lie in `pilots.json`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import adapt
import judging
import torch
from adapt import LORA, Setting

INSIDE = "res-tuning[mha=adapter,cross=adapter,ffn=adapter]"
EVERYWHERE = "res-tuning[mha=adapter,cross=adapter,ffn=adapter,block=adapter]"
BYPASS = "res-tuning-bypass"

CANDIDATES = {
    "unet": [
        Setting(LORA, 3e-3, {"rank": 8}),
        Setting(BYPASS, 3e-3, {"rank": 32}),
        Setting("res-tuning", 3e-3, {"rank": 17}),
        Setting(EVERYWHERE, 3e-3, {"rank": 10}),
        Setting(LORA, 1e-2, {"rank": 8}),
        Setting(BYPASS, 1e-2, {"rank": 32}),
        Setting(BYPASS, 3e-3, {"rank": 32, "kernel": 3}),
        Setting(LORA, 3e-2, {"rank": 8}),
        Setting(BYPASS, 3e-3, {"rank": 64}),
        Setting(BYPASS, 3e-3, {"rank": 32, "form": "replace"}),
        Setting("res-tuning", 1e-2, {"rank": 17}),
        *(Setting(BYPASS, lr, {"rank": 32, "form": "replace"}) for lr in (1e-3, 5e-3)),
        Setting(BYPASS, 1e-3, {"rank": 32}),
        Setting(BYPASS, 1e-3, {"rank": 32, "kernel": 3}),
        *(Setting(BYPASS, lr, {"rank": 32, "form": "replace", "kernel": 3}) for lr in (1e-3, 3e-3)),
        Setting("full", 1e-3),
        Setting("full", 3e-4),
    ],
    "dit": [
        *(Setting("full", lr) for lr in (3e-4, 1e-3)),
        *(Setting(LORA, lr, {"rank": 8}) for lr in (3e-3, 1e-2)),
        *(Setting(INSIDE, lr, {"rank": 18}) for lr in (3e-3, 1e-2)),
        *(Setting(BYPASS, lr, {"rank": 20}) for lr in (3e-3, 1e-2)),
    ],
}


def main() -> None:
    """Run what is missing, and print all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/image-generation"))
    parser.add_argument("--network", choices=list(CANDIDATES), default="unet")
    parser.add_argument("--base-steps", type=int, default=1600)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--shift", default="style", choices=list(judging.SHIFTS))
    parser.add_argument("--only", type=int, nargs="*", help="numbers of candidates")
    args = parser.parse_args()
    torch.set_num_threads(1)
    into = Path(__file__).with_name("pilots.json")
    rows = json.loads(into.read_text()) if into.exists() else []
    for number, setting in enumerate(CANDIDATES[args.network]):
        key = {"network": args.network, "shift": args.shift, "steps": args.steps, **vars(setting)}
        done = any(all(row[k] == v for k, v in key.items()) for row in rows)
        if done or (args.only and number not in args.only):
            continue
        model = adapt.base(args.network, args.base_steps, args.out)
        data = judging.training_set(args.shift, 50)
        made = adapt.adapted(
            args.network,
            model,
            setting,
            data,
            args.steps,
            50,
            args.out / "pilots" / f"{args.network}-{args.shift}-{number}",
        )
        found, _ = judging.judged(
            made.denoiser, args.shift, args.out, count=64, samples=64, scenes=judging.VALIDATION
        )
        row = {
            **key,
            "parameters": made.parameters,
            "saved_for_backward_bytes": made.saved,
            **{k: found[k] for k in ("epsilon_error", "attribute_accuracy", "fd_judge", "scenes")},
        }
        rows.append(row)
        into.write_text(json.dumps(rows, indent=1) + "\n")
        print(
            f"{number:2d} {setting.how:62s} {setting.lr:.0e} {setting.options} error "
            f"{row['epsilon_error']:.4f} attributes {row['attribute_accuracy']:.3f} FD "
            f"{row['fd_judge']:.1f} {made.parameters:,} {made.saved / 2**20:.1f} MiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
