"""Run the whole zoo: `python tests/zoo/run.py`; killed and started again, it goes on.

One JSON line a backbone is appended to the result. `docs/backbones.md` is drawn from it by
`python docs/draw_backbones.py`.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
import warnings
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))
RESULT = TESTS.parent / "benchmarks" / "results" / "zoo.jsonl"


def main() -> None:
    """Every member that has no line yet, or those named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="timm:NAME, transformers:NAME, torchvision:NAME")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--seconds", type=int, default=120, help="the most for one backbone")
    parser.add_argument("--again", action="store_true", help="those that failed, once more")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="only the smallest of every family of timm, and compile it",
    )
    parser.add_argument("--count", action="store_true", help="only write sizes.json")
    parser.add_argument("--library", default="", help="only names that start so")
    parser.add_argument("--shard", default="0/1", help="i/n: each n-th name from the i-th")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")

    import torch

    from zoo import chain, members, sizes

    if options.count:
        members.count()
        return
    torch.set_num_threads(1)
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    rows = {row["name"]: row for row in map(json.loads, lines)}
    everyone = members.everyone()
    shard, of = map(int, options.shard.split("/"))
    wanted = options.names or [
        n
        for n in list(everyone)[shard::of]
        if n.startswith(options.library)
        and (n not in rows or (options.again and not rows[n]["ok"]))
    ]
    if options.compile:
        wanted = sizes.smallest()

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {options.seconds} s")

    signal.signal(signal.SIGALRM, stop)
    started = time.time()
    for number, name in enumerate(wanted, 1):
        family, make = everyone[name]
        # Dynamo takes ten times as long as all the rest.
        compiled = options.compile or not name.startswith("timm:")
        signal.alarm(options.seconds)
        passed = chain.run(name, make, family=family, compiled=compiled)
        signal.alarm(0)
        rows[name] = passed.row()
        with options.out.open("a") as file:
            file.write(json.dumps(passed.row()) + "\n")
        print(
            f"{number}/{len(wanted)} {time.time() - started:.0f}s {name} "
            f"{'ok' if passed.ok else f'{passed.link}: {passed.reason}'}",
            flush=True,
        )


if __name__ == "__main__":
    main()
