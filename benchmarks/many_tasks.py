"""Many tasks on the same images: one backbone forward and a bank, against one model a task.

    python benchmarks/many_tasks.py

ViT-S/16 and ViT-B/16, batch 8, fp32, bypasses of rank 10 with heads of 10 to 100 classes. In
turns: the backbone alone, the backbone and a bank of 1, 19 and 64 tasks, one Res-Tuning model, and
one of ms-swift's bypass (when installed). N models cost N times one: that row is extrapolated, and
says so. Memory: `many_tasks_memory.py`.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import images
import rivals
from common import KEEP, apart, arguments, in_turns, paired, spread, started, target, write

MODELS = ("vit_small_patch16_224", "vit_base_patch16_224")
COUNTS = (1, 19, 64)


def world(args: Any, name: str, counts: tuple[int, ...]) -> tuple[Any, Any, dict[int, Any]]:
    """Images, a host and banks by number of tasks."""
    import timm
    import torch

    import restuning

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0).to(args.device)
    x = images.batch_of(model, args.batch, args.device)
    host = restuning.Host(model, x[:1])

    def task(number: int) -> Any:
        built = restuning.methods.build(
            "res-tuning-bypass", host, num_classes=10 + number % 91, zero=False
        )
        built.pool = host.readout_rule.pool
        return built.to(args.device)

    banks = {n: restuning.Bank({f"task {i}": task(i) for i in range(n)}) for n in counts if n}
    return x, host, banks


def times(args: Any, name: str) -> dict[str, Any]:
    """All rows of one backbone."""
    import timm
    import torch

    import restuning

    x, host, banks = world(args, name, COUNTS)
    tuned = restuning.Tuned(
        host, restuning.methods.build("res-tuning", host, num_classes=100).to(args.device)
    )
    bare = timm.create_model(name, num_classes=0).to(args.device).eval()

    def with_bank(bank: Any) -> Any:
        return lambda: bank(host.features(x, keep=bank.keep))

    runs = {"backbone": lambda: bare(x)}
    runs |= {f"{n} tasks": with_bank(bank) for n, bank in banks.items()}
    runs["one Res-Tuning model"] = lambda: tuned(x)
    with torch.no_grad():
        measured = in_turns(runs, args.rounds, args.device, warm=2)
        features = {n: host.features(x, keep=bank.keep) for n, bank in banks.items()}
        alone = in_turns(
            {
                f"bank of {n}": (lambda n=n, bank=bank: bank(features[n]))
                for n, bank in banks.items()
            },
            5 * args.rounds,
            args.device,
        )
        compiled = (
            in_turns(compiled_banks(banks, features, host), 5 * args.rounds, args.device)
            if args.compile
            else {}
        )
    base = measured["backbone"]
    over = {n: paired(t, base) for n, t in measured.items()}
    backbone = spread(base)["median"]
    # A bank takes milliseconds beside a forward whose own spread is larger: timed alone, too.
    bank_over = {n: spread(t)["median"] / backbone for n, t in alone.items()}
    return {
        "model": name,
        "seconds": {k: spread(v) for k, v in {**measured, **alone, **compiled}.items()},
        "over_backbone": over,
        "bank_alone_over_backbone": bank_over,
    }


def swift(args: Any, name: str) -> dict[str, Any]:
    """One of ms-swift's bypasses against the bare backbone, in turns."""
    import timm
    import torch

    torch.manual_seed(0)
    bare = timm.create_model(name, num_classes=0).to(args.device).eval()
    x = images.batch_of(bare, args.batch, args.device)
    model = rivals.swift(timm.create_model(name, num_classes=100).to(args.device))
    model = model.to(args.device).eval()
    with torch.no_grad():
        found = in_turns(
            {"backbone": lambda: bare(x), "model": lambda: model(x)}, args.rounds, args.device
        )
    return {"over_backbone": paired(found["model"], found["backbone"])}


def compiled_banks(banks: dict[int, Any], features: dict[int, Any], host: Any) -> dict[str, Any]:
    """The same banks under torch.compile, to see where that wins."""
    import torch

    runs = {}
    for n, bank in banks.items():
        made = torch.compile(bank)
        runs[f"compiled bank of {n}"] = lambda n=n, made=made: made(dict(features[n]), host.readout)
    return runs


def claims(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Targets of one backbone."""
    name = row["model"]
    found = []
    for n, limit in ((19, 1.05), (64, 1.10)):
        found.append(
            target(
                f"{name}: {n} tasks over one backbone forward",
                1 + row["bank_alone_over_backbone"][f"bank of {n}"],
                limit,
            )
        )
        found.append(
            target(
                f"{name}: {n} tasks over one backbone forward, end to end in turns",
                row["over_backbone"][f"{n} tasks"]["median"],
                limit,
            )
        )
    return found


def options() -> argparse.ArgumentParser:
    """What can be asked for."""
    parser = arguments(__doc__, __file__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--compile", action="store_true", help="also time compiled banks")
    return parser


def main() -> None:
    """Measure and write the JSON."""
    args = started(options())
    if args.one:
        name, _, what = args.one.partition("=")
        print(json.dumps((times if what == "times" else swift)(args, name)))
        return
    rows, targets = [], []
    for name in args.models:
        row = apart(args, f"{name}=times", KEEP)
        if "model" not in row:
            raise SystemExit(f"{name}: {row['not_measured']}")
        rival = apart(args, f"{name}=swift", KEEP)
        row["one_ms_swift_bypass"] = rival
        one = row["over_backbone"]["one Res-Tuning model"]["median"]
        row["extrapolated_over_backbone"] = {"19 Res-Tuning models": 19 * one}
        if "over_backbone" in rival:
            row["extrapolated_over_backbone"]["19 ms-swift bypasses"] = (
                19 * rival["over_backbone"]["median"]
            )
        rows.append(row)
        targets += claims(row)
    write(
        args,
        f"N tasks on the same {args.batch} images, fp32",
        batch=args.batch,
        rows=rows,
        targets=targets,
    )


if __name__ == "__main__":
    main()
