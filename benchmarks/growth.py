"""Memory over 1,000 forwards and 100 attach/detach cycles.

    python benchmarks/growth.py

A small ViT, so that a leak of one tensor a call would show beside it. Resident memory and live
tensors are read after the first tenth and at the end; each row is a process of its own.
"""

from __future__ import annotations

import gc
import json
from typing import Any

from common import apart, arguments, now_bytes, started, target, write

ROWS = (
    "res-tuning, training steps",
    "res-tuning-bypass, training steps",
    "bank of 19, forwards",
    "attach and detach",
)
ALLOWED = 4 * 2**20
"""Bytes by which an allocator may wander; 1,000 leaked streams of this ViT would be 65 MB."""


def tensors() -> int:
    """Live tensors."""
    import torch

    gc.collect()
    # By type, not isinstance: that would wake lazy proxies of other libraries.
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def measure(args: Any, row: str) -> dict[str, Any]:
    """One row."""
    import timm
    import torch

    import restuning

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0, depth=4).to(
        args.device
    )
    x = torch.randn(4, 3, 64, 64, device=args.device)

    if row == "attach and detach":
        count = args.cycles

        def turn() -> None:
            with restuning.Host(model, x[:1]) as host:
                task = restuning.methods.build("res-tuning", host, num_classes=10)
                restuning.Tuned(host, task.to(args.device))(x).sum().backward()
    else:
        count = args.forwards
        host = restuning.Host(model, x[:1])
        if row.startswith("bank"):
            tasks = {
                str(i): restuning.methods.build("res-tuning-bypass", host, num_classes=10)
                for i in range(19)
            }
            together = restuning.MultiTask(host, tasks).to(args.device)

            def turn() -> None:
                together(x)
        else:
            task = restuning.methods.build(row.partition(",")[0], host, num_classes=10)
            tuned = restuning.Tuned(host, task.to(args.device))
            optimiser = torch.optim.AdamW(task.parameters())

            def turn() -> None:
                tuned(x).sum().backward()
                optimiser.step()
                optimiser.zero_grad()

    early = count // 10
    for _ in range(early):
        turn()
    before, tensors_before = now_bytes(args.device), tensors()
    for _ in range(count - early):
        turn()
    return {
        "row": row,
        "turns": count,
        "bytes_early": before,
        "bytes_end": now_bytes(args.device),
        "tensors_early": tensors_before,
        "tensors_end": tensors(),
    }


def main() -> None:
    """Measure and write the JSON."""
    parser = arguments(__doc__, __file__)
    parser.add_argument("--forwards", type=int, default=1000)
    parser.add_argument("--cycles", type=int, default=100)
    args = started(parser)
    if args.one:
        print(json.dumps(measure(args, args.one)))
        return
    rows = [apart(args, row) for row in ROWS]
    targets = []
    for row in rows:
        if "row" not in row:
            raise SystemExit(row["not_measured"])
        targets += [
            target(
                f"{row['row']}: more tensors after {row['turns']}",
                row["tensors_end"] - row["tensors_early"],
                0,
            ),
            target(
                f"{row['row']}: MiB more after {row['turns']}",
                (row["bytes_end"] - row["bytes_early"]) / 2**20,
                ALLOWED / 2**20,
            ),
        ]
    write(args, "memory over many forwards and attachments", rows=rows, targets=targets)


if __name__ == "__main__":
    main()
