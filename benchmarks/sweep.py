"""Sixteen arms of a sweep against one, from images and from the store.

    python benchmarks/sweep.py

ViT-B/16 shapes, 1000 images, 100 epochs, batch 64. One arm is `fit` from the store; sixteen arms
train as one bank (`train_in_parallel`, what `restuning sweep` calls), each with a learning rate of its own.
Features are random numbers in a real store: training from it does not depend on them. The pass over
the images is extrapolated from a few batches of the same backbone, and says so.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import images
from common import arguments, seconds, spread, started, target, write

CLASSES, BATCH = 100, 32


def stored_at_random(host: Any, root: Path, name: str, count: int, example: Any) -> Any:
    """A store of random features."""
    import torch

    from restuning import Needs
    from restuning.features import DataKey, Store, place, store_key
    from restuning.features.extract import cut, prepare, shard_rows
    from restuning.features.writing import finish, write_shard

    key = store_key(
        host,
        Needs(host.sites.taps, "cls"),
        (example,),
        DataKey("random", "0", {"train": count}),
        backbone=name,
    )
    folder = place(root, key)
    prepare(folder, key)
    plan = cut(key, shard_rows(key, BATCH))
    for shard in plan:
        rows = torch.randn(shard.stop - shard.start, key.values_per_row)
        labels = [i % CLASSES for i in range(shard.start, shard.stop)]
        write_shard(folder, key, shard, rows, labels)
    finish(folder, key, plan)
    return Store(folder)


def options() -> argparse.ArgumentParser:
    """What can be asked for."""
    parser = arguments(__doc__, __file__)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--arms", type=int, default=16)
    parser.add_argument("--passes", type=int, default=3, help="batches of 32 of the timed pass")
    return parser


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Times, what they say of all arms beside one, and targets."""
    import timm
    import torch

    from restuning import FitSettings, Host, methods
    from restuning.data.data import collate_batch
    from restuning.features import Cached, StoredFeatures
    from restuning.training import fit
    from restuning.training.parallel_runs import train_in_parallel

    torch.manual_seed(0)
    model = timm.create_model(args.model, num_classes=0).to(args.device)
    x = images.batch_of(model, BATCH, args.device)
    host = Host(model, x[:1])

    def task() -> Any:
        torch.manual_seed(0)
        made = methods.build("res-tuning-bypass", host, num_classes=CLASSES)
        return made.to(args.device)

    keep = task().needs(host.readout_rule)
    host.features(x, keep=keep)
    batches = [
        seconds(lambda: host.features(x, keep=keep), args.device) for _ in range(args.passes)
    ]
    one_pass = spread([b / BATCH * args.images for b in batches])
    with tempfile.TemporaryDirectory() as root:
        store = stored_at_random(host, Path(root), args.model, args.images, torch.zeros_like(x[:1]))
        train = StoredFeatures(store, ["train"])

        def single(epochs: int, name: str) -> Any:
            return lambda: fit(
                Cached(host, task(), store),
                train,
                settings=FitSettings(epochs=epochs),
                out=Path(root) / name,
                collate=collate_batch,
                progress=False,
            )

        def together(epochs: int) -> Any:
            rates = [FitSettings(epochs=epochs, lr=1e-4 * 1.3**k) for k in range(args.arms)]
            return lambda: train_in_parallel(host, [task() for _ in rates], rates, train, None)

        single(1, "warm")()
        together(1)()
        first = seconds(single(args.epochs, "one"), args.device)
        many = seconds(together(args.epochs), args.device)
        again = seconds(single(args.epochs, "two"), args.device)
    # Once before and once after, so that a drift of the machine weighs on both.
    alone = (first + again) / 2
    live = {"one arm": one_pass["median"] + alone, "all arms": one_pass["median"] + many}
    return {
        "arms": args.arms,
        "images": args.images,
        "epochs": args.epochs,
        "seconds": {
            "pass over the images (extrapolated)": one_pass,
            "one arm from the store": spread([first, again]),
            "all arms from the store": many,
        },
        "rows": [
            {"from": "images", **live, "all_over_one": live["all arms"] / live["one arm"]},
            {"from": "store", "one arm": alone, "all arms": many, "all_over_one": many / alone},
        ],
        "targets": [
            target(
                f"from images, {args.arms} arms over one arm",
                live["all arms"] / live["one arm"],
                1.5,
            ),
            target(
                f"from the store, {args.arms} arms over {args.arms} single cached runs",
                many / (args.arms * alone),
                0.7,
            ),
        ],
    }


def main() -> None:
    """Measure and write the JSON."""
    args = started(options())
    found = measure(args)
    what = f"{args.arms} arms, {args.images} images, {args.epochs} epochs, {args.model}"
    write(args, what, **found)


if __name__ == "__main__":
    main()
