"""Training from a store eight times larger than the memory that it may take, beside all of it in memory.

    python benchmarks/beyond_memory.py --threads 1

Handwritten digits on restuning-tiny, the training rows sorted by class as folders are, so that neighbours in the store are
alike. The training split is half of a store, so that its rows are four times what is allowed. Each row is a process of its own
that makes the runs of `restuning.train` over some seeds, with all rows at hand or with `memory`. Losses are compared over
eight seeds on class tokens; memory on all tokens (a store of 399 MiB), where there is something to be seen.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import apart, arguments, started, target, write

TIMES = 8
"""How much larger a store is than the memory that is allowed."""

ALL_TOKENS = "res-tuning-bypass, all tokens"
RUNS: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear", "epochs": 10, "seeds": 8},
    "res-tuning-bypass": {"method": "res-tuning-bypass", "epochs": 10, "seeds": 8},
    ALL_TOKENS: {"method": "res-tuning-bypass", "pool": "mean", "epochs": 4, "seeds": 1},
    # What is solved in one pass knows no seed.
    "ridge": {"method": "ridge", "seeds": 1},
}
ERRORS = 3.0
"""Standard errors within which two means over seeds are the same."""
POINTS = 1.0
ROUNDING = 1e-4
"""Of a closed form: the same rows in the same order."""


def sorted_digits(backbone: Any) -> Any:
    """The digits, of whose training split the classes follow one another."""
    from torch.utils.data import Subset

    import restuning
    from restuning.data.labelled import find_labels

    data = restuning.load_data("digits", backbone)
    labels = find_labels(data.train)
    order = sorted(range(len(labels)), key=labels.__getitem__)
    return data.with_splits(train=Subset(data.train, order))


def one_row(root: str, name: str, allowed: int) -> dict[str, Any]:
    """The runs of one row, and what they took; nothing is limited where `allowed` is 0."""
    import restuning

    backbone = restuning.load_backbone("restuning-tiny")
    data, how = sorted_digits(backbone), dict(RUNS[name])
    found = []
    began = time.perf_counter()
    for seed in range(how.pop("seeds")):
        with tempfile.TemporaryDirectory() as out:
            run = restuning.train(
                data,
                backbone=backbone,
                memory=allowed or None,
                seed=seed,
                out=out,
                store=Path(root),
                device="cpu",
                report=False,
                progress=False,
                **how,
            )
        found.append(run.metrics)
    losses = [m["train_loss"] for m in found]
    features = found[0]["features"]
    return {
        "run": name,
        "rows held": features.get("rows_at_once", "all"),
        "seeds": len(found),
        "training loss": statistics.mean(losses),
        "deviation over seeds": statistics.stdev(losses) if len(losses) > 1 else None,
        "test accuracy, %": 100 * statistics.mean(m["test_accuracy"] for m in found),
        "peak_bytes": max(m["peak_memory_bytes"] for m in found),
        "seconds": time.perf_counter() - began,
        "store_bytes": features["bytes"],
    }


def compare(name: str, whole: dict[str, Any], part: dict[str, Any]) -> list[dict[str, Any]]:
    """What is claimed of one kind of run."""
    loss = part["training loss"] - whole["training loss"]
    if name == "ridge":
        return [target("ridge: loss of rows left out above all at hand", abs(loss), ROUNDING)]
    if name == ALL_TOKENS:
        saved = whole["peak_bytes"] - part["peak_bytes"]
        held = whole["store_bytes"] / 2 * (1 - 2 / TIMES)
        # One seed says nothing of losses.
        return [
            target(
                f"{name}: peak below all at hand, over the training rows that are not held",
                saved / held,
                0.9,
                at_least=True,
            )
        ]
    error = sum(row["deviation over seeds"] ** 2 / row["seeds"] for row in (whole, part)) ** 0.5
    return [
        target(f"{name}: mean loss above all at hand, in standard errors", loss / error, ERRORS),
        target(
            f"{name}: points of test accuracy below all at hand",
            whole["test accuracy, %"] - part["test accuracy, %"],
            POINTS,
        ),
    ]


def main() -> None:
    """Train, and write the JSON."""
    parser = arguments(__doc__, __file__)
    parser.add_argument("--root", help="folder of the stores; default a temporary one")
    args = started(parser)
    if args.one:
        name, allowed = args.one.rsplit(" ", 1)
        print(json.dumps(one_row(args.root, name, int(allowed))))
        return
    rows: list[dict[str, Any]] = []
    targets: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as root:
        args.root = args.root or root
        for name in RUNS:
            whole = apart(args, f"{name} 0")
            allowed = whole["store_bytes"] // TIMES
            part = apart(args, f"{name} {allowed}")
            targets += compare(name, whole, part)
            rows += [whole, {**part, "allowed_bytes": allowed}]
    write(
        args,
        "training from a store that is eight times larger than the memory it may take, fp32",
        rows=rows,
        targets=targets,
    )


if __name__ == "__main__":
    main()
