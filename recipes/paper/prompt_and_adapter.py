"""Experiment (b): Res-Prompt on MHA with Res-Adapter on FFN, on all shared tasks.

    python recipes/paper/prompt_and_adapter.py --seeds 3

Paper, Table 2: any tuner can stand beside any operation, and combinations beat single tuners.
Here: ViT-Ti/16 at 112 px, 1000 training images a task, length and rank 10, channel scales; 3 epochs
in bf16 (a third of experiment (a)'s: there are twelve tasks), a minute a run on 1 CPU core. Linear
probes of the same tasks stand in experiment (c).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import backbone, into_docs, require_data, run, table, task_data, tasks, write

METHOD = "res-tuning[mha=prompt,ffn=adapter]"
EPOCHS = 3


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
    rows = []
    for seed in range(args.seeds):
        for name in tasks():
            data = task_data(name, loaded)
            rows.append(run("prompt_and_adapter", METHOD, host, data, seed, args.work, EPOCHS))
        command = f"python recipes/paper/prompt_and_adapter.py --seeds {seed + 1}"
        write("prompt_and_adapter", command, rows)
        into_docs("prompt_and_adapter", table(rows, [METHOD]))


if __name__ == "__main__":
    main()
