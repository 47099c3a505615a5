"""How the embedded backbone transfers: scikit-learn's handwritten digits, three seeds.

    python recipes/digits.py

Test accuracy of the last checkpoint, trained on train and val, by the command line's defaults (which
were chosen on the val split): linear probing on restuning-tiny and on the same network with random
weights, Res-Tuning, Res-Tuning-Bypass, and the classifier in closed form. About 10 minutes on 2 CPU cores; writes
`recipes/digits.json`. Expected: Res-Tuning well above linear probing, and that far above linear
probing on random weights.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import torch

import restuning

ROWS = [
    ("linear, random weights", ["--method", "linear", "--random"]),
    ("linear", ["--method", "linear"]),
    ("res-tuning-bypass", ["--method", "res-tuning-bypass"]),
    ("res-tuning", ["--method", "res-tuning"]),
    ("ridge", ["--method", "ridge"]),
]
RESULTS = Path(__file__).with_suffix(".json")


def main() -> None:
    """Every row with every seed, through the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("runs/digits-recipe"))
    parser.add_argument(
        "--rows",
        nargs="*",
        default=[name for name, _ in ROWS],
        help="only these; the others stay as they are",
    )
    args = parser.parse_args()
    kept = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    rows = [row for row in kept if row["name"] not in args.rows]
    for name, options in ROWS:
        if name not in args.rows:
            continue
        found = []
        for seed in range(args.seeds):
            out = args.work / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            command = [
                sys.executable,
                "-m",
                "restuning",
                "train",
                "digits",
                *options,
                "--final",
                "--seed",
                str(seed),
                "--out",
                str(out),
                "--json",
            ]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found.append(json.loads(done.stdout))
        accuracy = [row["test_accuracy"] for row in found]
        rows.append(
            {
                "name": name,
                "options": options,
                "test_accuracy": accuracy,
                "mean": statistics.mean(accuracy),
                "std": statistics.stdev(accuracy),
                "trainable_parameters": found[0]["trainable_parameters"],
                "seconds": [row["seconds"] for row in found],
            }
        )
        print(f"{name:24s} {100 * rows[-1]['mean']:.2f} ± {100 * rows[-1]['std']:.2f}", flush=True)
    report = {
        "command": f"python recipes/digits.py --seeds {args.seeds}",
        "versions": {"restuning": restuning.__version__, "torch": torch.__version__},
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
