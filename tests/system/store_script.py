"""Builds a feature store in a process of its own: `store_script.py ROOT [sleep] [limit]`.

Prints one line a backbone forward. With a limit, files may not grow beyond so many bytes: a disk
that is full, as the operating system says it.
"""

import resource
import signal
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import Dataset

from awake import tiny_vit
from restuning import Host, Needs, RestuningError
from restuning.features import DataKey, build, store_key

COUNT, BATCH = 96, 4


class Noise(Dataset):
    """Images that depend on their index alone."""

    def __init__(self, count=COUNT):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return torch.randn(3, 32, 32, generator=generator), index % 5


def host_and_key(
    dtype="fp32",
    views=("plain",),
    seed=0,
    splits=None,
    tokens="cls",
    precision="fp32",
    pool_patches=1,
):
    host = Host(tiny_vit(seed), torch.zeros(1, 3, 32, 32))
    key = store_key(
        host,
        Needs(host.sites.taps, tokens, pool_patches),
        (torch.zeros(1, 3, 32, 32),),
        DataKey("noise", "0", splits or {"train": COUNT}, {"size": 32}, views),
        backbone="tiny",
        dtype=dtype,
        precision=precision,
    )
    return host, key


def main(root, sleep=0.0, limit=0):
    # Small shards, so that there is something to kill between.
    sys.modules["restuning.features.extract"].SHARD_ROWS = 8
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    host, key = host_and_key()
    first = True

    def count(*_):
        nonlocal first
        if not first:
            print("forward", flush=True)
            time.sleep(sleep)
        first = False

    first = False
    host.model.register_forward_hook(count)
    try:
        store = build(
            host, key, Path(root), {("train", 0): Noise()}, batch_size=BATCH, progress=False
        )
    except RestuningError as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from None
    print(store.path, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], *map(float, sys.argv[2:3]), *map(int, sys.argv[3:4]))
