"""Peak memory of a batch that many tasks answer, over the backbone's own.

    python benchmarks/many_tasks_memory.py

ViT-S/16 and ViT-B/16, batch 8, fp32; no task, and 19 and 64 bypasses of rank 10. Counted, not
measured: the ledger of `restuning.forecast` follows every storage of a forward from its making to
its release. What a process holds free from before decides a measured peak of this size, and a
process that has built 64 tasks holds a lot; `benchmarks/forecast.py` shows that the count is right.
"""

from __future__ import annotations

from typing import Any

from common import arguments, started, target, write
from many_tasks import MODELS

COUNTS = (19, 64)


def rows_of(name: str, batch: int) -> list[dict[str, Any]]:
    """No task and every number of tasks on one backbone."""
    import timm
    import torch

    from restuning import Host, MultiTask, forecast, methods

    example = torch.zeros(1, 3, 224, 224)
    host = Host(timm.create_model(name, num_classes=0), example)
    bare = forecast.forecast_forward(host.model, example, batch)
    rows = [{"model": name, "tasks": 0, "peak_bytes": bare.above_bytes}]
    for count in COUNTS:
        tasks = {
            f"task {i}": methods.build("res-tuning-bypass", host, num_classes=10 + i % 91)
            for i in range(count)
        }
        told = forecast.forecast_forward(MultiTask(host, tasks), example, batch)
        rows.append(
            {
                "model": name,
                "tasks": count,
                "peak_bytes": told.above_bytes,
                "bank_bytes": told.weights_bytes - bare.weights_bytes,
                "over_no_task": told.above_bytes / bare.above_bytes,
            }
        )
    return rows


def main() -> None:
    """Count and write the JSON."""
    parser = arguments(__doc__, __file__)
    parser.add_argument("--batch", type=int, default=8)
    args = started(parser)
    rows = [row for name in MODELS for row in rows_of(name, args.batch)]
    targets = [
        target(
            f"{row['model']}: peak of a batch with {row['tasks']} tasks over no task",
            row["over_no_task"],
            1.02,
        )
        for row in rows
        if row["tasks"]
    ]
    write(
        args,
        f"peak memory of a batch of {args.batch} above the weights, fp32, counted",
        batch=args.batch,
        rows=rows,
        targets=targets,
    )


if __name__ == "__main__":
    main()
