"""What it costs to open a store whose files are compared with their sha256.

    python benchmarks/verified_store.py

A store of `--mib` MiB, as a process meets it: opened for the first time (every file is read), opened
again in the same process and in a new one that finds the digests of the first, each against opening
without comparing anything (as `cache ls` does). Claim: what was verified opens in at most 50 ms more.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import arguments, spread, started, target, write

ROUNDS = 9
MORE = 50.0

OPEN = """
import json, sys, time
from restuning.features import Store
times = {}
for name, verify in (("verified", True), ("verified, again", True), ("not verified", False)):
    started = time.perf_counter()
    Store(sys.argv[1], verify=verify)
    times[name] = 1000 * (time.perf_counter() - started)
print(json.dumps(times))
"""


def make(root: Path, mib: int) -> Path:
    """A store of random numbers: class tokens of 13 taps of ViT-B/16, fp32, shards as always."""
    import torch

    from restuning.features import StoreKey, Tap, place
    from restuning.features.extract import cut, prepare, shard_rows
    from restuning.features.writing import finish, write_shard

    taps = tuple(Tap(f"block.{n}", (1, 768)) for n in range(13))
    rows = mib * 2**20 // (13 * 768 * 4)
    key = StoreKey(
        {"name": "random", "class": "none"},
        taps,
        "cls",
        "fp32",
        {},
        {"name": "random", "identity": "0"},
        ("plain",),
        {"train": rows},
    )
    folder = place(root, key)
    prepare(folder, key)
    plan = cut(key, shard_rows(key, 32))
    for shard in plan:
        values = torch.randn(shard.stop - shard.start, key.values_per_row)
        write_shard(folder, key, shard, values, [0] * len(values))
    finish(folder, key, plan)
    return folder


def opened(folder: Path, cache: Path) -> dict[str, float]:
    """Milliseconds of opening in a new process."""
    environment = {**os.environ, "RESTUNING_CACHE": str(cache)}
    command = [sys.executable, "-c", OPEN, str(folder)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure, and write the result."""
    parser = arguments(__doc__ or "", __file__)
    parser.add_argument("--mib", type=int, default=1024)
    args = started(parser)
    with tempfile.TemporaryDirectory() as root:
        folder, cache = make(Path(root), args.mib), Path(root) / "cache"
        # A file that was just written is remembered by nobody.
        time.sleep(4)
        first = opened(folder, cache)
        rounds = [opened(folder, cache) for _ in range(ROUNDS)]
        files = len(list(folder.glob("*.npy")))
    times = {name: spread([each[name] for each in rounds]) for name in rounds[0]}
    more = [each["verified"] - each["not verified"] for each in rounds]
    again = [each["verified, again"] - each["not verified"] for each in rounds]
    write(
        args,
        f"a store of {args.mib} MiB in {files} files, opened and compared with its sha256",
        files=files,
        first_milliseconds=first["verified"],
        milliseconds=times,
        more_in_a_new_process=spread(more),
        more_in_the_same_process=spread(again),
        targets=[
            target(
                "milliseconds that a verified store opens slower, new process",
                spread(more)["median"],
                MORE,
            ),
            target(
                "milliseconds that a verified store opens slower, same process",
                spread(again)["median"],
                MORE,
            ),
        ],
    )


if __name__ == "__main__":
    main()
