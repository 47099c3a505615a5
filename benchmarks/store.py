"""The feature store: bytes an image, speed of random reads, cost of extraction.

    python benchmarks/store.py

ViT-B/16 shapes, class token of 13 taps, fp16. Reads: batches of random rows through `Store`
against plain NumPy indexing of one memory map of the same bytes, in turns, the files warm; once
read from the files (as a store beyond memory is) and once as training reads it (held decoded). The
store gives fp32 tensors, so what is compared is NumPy's rows made into such; rows left in fp16 are
timed beside it.
Extraction: `build` over images in memory against bare forwards of the same model over the same
batches, in turns.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from common import arguments, in_turns, paired, spread, started, target, write

ROWS, BATCH, READ_ROUNDS = 20_000, 64, 15


def reads(args: Any, host: Any, root: Path) -> dict[str, Any]:
    """Random batches of a store written from random numbers."""
    import numpy as np
    import torch

    from restuning import Needs
    from restuning.features import DataKey, Store, place, store_key
    from restuning.features import store as of_store
    from restuning.features.extract import cut, prepare, shard_rows
    from restuning.features.writing import finish, write_shard

    example = torch.zeros(1, 3, 224, 224, device=args.device)
    key = store_key(
        host,
        Needs(host.sites.taps, "cls"),
        (example,),
        DataKey("random", "0", {"train": args.rows}),
        backbone=args.model,
        dtype="fp16",
    )
    folder = place(root, key)
    prepare(folder, key)
    plan = cut(key, shard_rows(key, BATCH))
    plain = np.lib.format.open_memmap(
        root / "plain.npy", "w+", np.float16, (args.rows, key.values_per_row)
    )
    for shard in plan:
        values = torch.randn(shard.stop - shard.start, key.values_per_row)
        write_shard(folder, key, shard, values, [0] * len(values))
        plain[shard.start : shard.stop] = values.half().numpy()
    finish(folder, key, plan)
    plain.flush()
    plain = np.load(root / "plain.npy", mmap_mode="r")
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, args.rows, BATCH) for _ in range(100)]
    held, files = Store(folder), Store(folder)

    def raw() -> None:
        for batch in batches:
            np.asarray(plain[batch])

    def raw_fp32() -> None:
        for batch in batches:
            torch.from_numpy(np.asarray(plain[batch])).float()

    def from_files() -> None:
        for batch in batches:
            files.rows("train", 0, batch)

    def from_memory() -> None:
        for batch in batches:
            held.rows("train", 0, batch)

    limit, of_store.IN_MEMORY = of_store.IN_MEMORY, 0
    times = in_turns(
        {"numpy": raw, "numpy, to fp32": raw_fp32, "store, from files": from_files},
        READ_ROUNDS,
        args.device,
    )
    of_store.IN_MEMORY = limit
    times |= in_turns(
        {"numpy, to fp32, again": raw_fp32, "store, held": from_memory}, READ_ROUNDS, args.device
    )
    count = BATCH * len(batches)
    store = Store(folder)
    return {
        "bytes_per_image": store.key.bytes_per_row,
        "bytes_on_disk": store.bytes,
        "rows": args.rows,
        "images_per_second": {n: count / spread(t)["median"] for n, t in times.items()},
        "files_over_numpy": paired(times["numpy"], times["store, from files"]),
        "files_over_numpy_to_fp32": paired(times["numpy, to fp32"], times["store, from files"]),
        "held_over_numpy_to_fp32": paired(times["numpy, to fp32, again"], times["store, held"]),
    }


def extraction(args: Any, host: Any, bare: Any, root: Path) -> dict[str, Any]:
    """Building a store of few images against bare forwards of the same batches."""
    import torch

    from restuning import Needs
    from restuning.features import DataKey, build, store_key

    images = torch.randn(args.images, 3, 224, 224)
    data = [(image, 0) for image in images]
    size = min(args.batch, args.images)
    number = 0
    example = torch.zeros(1, 3, 224, 224, device=args.device)
    needs = Needs(host.sites.taps, "cls")

    def key() -> Any:
        nonlocal number
        number += 1
        return store_key(
            host,
            needs,
            (example,),
            DataKey("images", str(number), {"train": args.images}),
            backbone=args.model,
            dtype="fp16",
        )

    keys = [key() for _ in range(args.rounds + 1)]

    def extract() -> None:
        build(host, keys.pop(), root, {("train", 0): data}, batch_size=size, progress=False)

    def forwards() -> None:
        with torch.no_grad():
            for start in range(0, args.images, size):
                bare(images[start : start + size].to(args.device))

    times = in_turns({"extraction": extract, "bare forwards": forwards}, args.rounds, args.device)
    return {
        "images": args.images,
        "batch": size,
        "seconds": {n: spread(t) for n, t in times.items()},
        "extraction_over_forwards": paired(times["extraction"], times["bare forwards"]),
    }


def main() -> None:
    """Measure and write the JSON."""
    parser = arguments(__doc__, __file__)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=4)
    args = started(parser)

    import timm
    import torch

    import restuning

    torch.manual_seed(0)
    model = timm.create_model(args.model, num_classes=0).to(args.device)
    bare = timm.create_model(args.model, num_classes=0).to(args.device).eval()
    host = restuning.Host(model, torch.randn(1, 3, 224, 224, device=args.device))
    with tempfile.TemporaryDirectory() as root:
        read = reads(args, host, Path(root))
        extracted = extraction(args, host, bare, Path(root))
    write(
        args,
        f"feature store of {args.model}, class token, fp16",
        reads=read,
        extraction=extracted,
        targets=[
            target("bytes an image", read["bytes_per_image"], 20_000),
            target(
                "random reads over plain NumPy memory map, both to fp32 tensors, from files",
                read["files_over_numpy_to_fp32"]["median"],
                0.9,
                at_least=True,
            ),
            target(
                "random reads over plain NumPy memory map, both to fp32 tensors, as training reads",
                read["held_over_numpy_to_fp32"]["median"],
                0.9,
                at_least=True,
            ),
            target(
                "extraction over bare forward passes",
                extracted["extraction_over_forwards"]["median"],
                1.05,
            ),
        ],
    )


if __name__ == "__main__":
    main()
