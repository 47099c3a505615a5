"""Experiment (a): prefix tuning in its unbound form against its embedded form, on cifar100.

    python recipes/paper/prefix_unbound.py --seeds 3

Paper, Table 1: on ViT-B/16 the unbound Res-Prefix is as good as the embedded prefix or a little
better. Here: ViT-Ti/16 at 112 px, 1000 training images, single Res-Prefix of length 10 on MHA
(`res-tuning[mha=prefix]`, no scale) against `prefix` (the exact, input-dependent lambda, equal to
keys and values inside the softmax). 10 epochs in bf16, 3 minutes a run on
1 CPU core.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import backbone, into_docs, require_data, run, table, task_data, write

METHODS = ["prefix", "res-tuning[mha=prefix]"]


def main() -> None:
    """Run what is missing, then write the JSON and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/paper"))
    args = parser.parse_args()
    require_data()
    torch.set_num_threads(args.threads)
    loaded, host = backbone()
    data = task_data("cifar100", loaded)
    rows = [
        run("prefix_unbound", method, host, data, seed, args.work)
        for seed in range(args.seeds)
        for method in METHODS
    ]
    write("prefix_unbound", f"python recipes/paper/prefix_unbound.py --seeds {args.seeds}", rows)
    into_docs("prefix_unbound", table(rows, METHODS))


if __name__ == "__main__":
    main()
