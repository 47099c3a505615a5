"""Images a second of each stage of a pass over JPEGs, and of the whole, beside bare forwards.

Reading, decoding (with resizing and normalising) and writing shards are timed by themselves in one
process; bare forwards run on tensors that are decoded already. The whole is `build_store`, what
`restuning cache` does, with no loader process and with as many as it chooses, at least one.

With `--tars N` one pass over N tars of `--images` images in all: the time of looking through them and of the pass by
stage, the bottleneck that the progress line names, and the memory of all processes, sampled.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import common
import images


def measure(args: Any, folder: Path) -> dict[str, Any]:
    """All stages in turns, in images a second."""
    import torch
    from torch.utils.data import default_collate

    import restuning
    from restuning.features import StoreOptions, build_store
    from restuning.features.manifest import Shard
    from restuning.features.stages import choose_workers
    from restuning.features.writing import write_shard

    data_folder = images.make(folder / "photos", args.images, 0, 10)
    backbone = restuning.load_backbone(args.backbone, random=True)
    model = backbone.model.eval().to(args.device)
    train = restuning.load_data(str(data_folder), backbone).train
    # Tensors that are kept in memory would be decoded once in all rounds.
    train.in_memory = None
    count, batch = len(train), args.batch
    ready = [
        default_collate([train[i] for i in range(start, min(start + batch, count))])[0]
        for start in range(0, count, batch)
    ]
    workers = max(1, choose_workers(train, batch))
    built: list[Any] = []

    def read() -> None:
        for file in train.files:
            file.read_bytes()

    def decode() -> None:
        for index in range(count):
            train[index]

    @torch.no_grad()
    def forward() -> None:
        for inputs in ready:
            model(inputs.to(args.device)).cpu()

    def whole(loaders: int) -> None:
        root = folder / "stores"
        options = StoreOptions(root, batch_size=batch, workers=loaders, progress=False)
        built.append(
            build_store(
                data_folder, backbone, tokens="cls", device=args.device, options=options
            ).stages
        )
        shutil.rmtree(root)

    # One to write rows of.
    options = StoreOptions(folder / "first", batch_size=batch, workers=0, progress=False)
    first = build_store(
        data_folder, backbone, tokens="cls", device=args.device, options=options
    ).store
    rows, labels = first.rows("train", 0, range(count)), first.labels("train").tolist()

    def write() -> None:
        (folder / "written").mkdir()
        write_shard(folder / "written", first.key, Shard("train", 0, 0, count), rows, labels)
        shutil.rmtree(folder / "written")

    runs = {
        "read": read,
        "decode": decode,
        "bare forward": forward,
        "write": write,
        "whole, main process decodes": lambda: whole(0),
        "whole, loader processes": lambda: whole(workers),
    }
    times = common.in_turns(runs, args.rounds, args.device)
    inside = [stages.to_dict() for stages in built]
    # What a pass spends itself, without the backbone's load and the data's identity.
    for name, chosen in (
        ("pass, main process decodes", [s for s in inside if s["workers"] == 0]),
        ("pass, loader processes", [s for s in inside if s["workers"] > 0]),
    ):
        times[name] = [s["seconds"] for s in chosen][-args.rounds :]
    bare = times["bare forward"]
    return {
        "images": count,
        "side": images.SIDE,
        "batch": batch,
        "backbone": args.backbone,
        "loader processes": workers,
        "images a second": {
            name: common.spread([count / t for t in several])
            for name, several in times.items()
            if several
        },
        "times of bare forwards": {
            name: common.paired(times[name], bare) for name in times if times[name]
        },
        "last passes": inside[-2:],
    }


class Sampled:
    """Memory of this process and its loader processes together, in MiB, every half second while it is open.

    Pages that several share are counted once, a part in each (proportional set size, of Linux): a loader process that is
    started late shares more of its parent's pages, and would look like growth.
    """

    def __init__(self) -> None:
        self.values: list[float] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        import psutil

        whole = psutil.Process()
        while not self._ended.wait(0.5):
            resident = 0
            for process in [whole, *whole.children(recursive=True)]:
                # One may have ended meanwhile.
                with suppress(psutil.Error):
                    resident += process.memory_full_info().pss
            self.values.append(resident / 2**20)

    def __enter__(self) -> Sampled:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()


def measure_tars(args: Any, folder: Path) -> dict[str, Any]:
    """One pass over tars."""
    import restuning
    from restuning.features import StoreOptions, build_store

    # What is kept of the tars lies there as well: nobody has read them before.
    os.environ["RESTUNING_CACHE"] = str(folder / "cache")
    tars = images.make_tars(folder / "shots", args.tars, args.images, 10)
    size = sum(file.stat().st_size for file in tars.iterdir())
    backbone = restuning.load_backbone(args.backbone, random=args.backbone != "restuning-tiny")
    start = time.perf_counter()
    restuning.load_data(str(tars), backbone)
    first = time.perf_counter() - start
    start = time.perf_counter()
    restuning.load_data(str(tars), backbone)
    again = time.perf_counter() - start
    options = StoreOptions(
        folder / "stores", batch_size=args.batch, workers=None, progress=False, dtype="fp16"
    )
    with Sampled() as memory:
        built = build_store(tars, backbone, tokens="cls", device=args.device, options=options)
    stages = built.stages
    assert stages is not None
    values = memory.values
    # The first tenth is imports, kernels and the first shard.
    held = values[len(values) // 10 :]
    half = len(held) // 2
    growth = max(held[half:]) / max(held[:half])
    return {
        "tars": args.tars,
        "images": args.images,
        "bytes of tars": size,
        "side": images.SIDE,
        "backbone": args.backbone,
        "batch": args.batch,
        "seconds of looking through tars": {"first": first, "again": again},
        "images a second": stages.rows / stages.seconds,
        "pass": stages.to_dict(),
        "bottleneck": stages.bottleneck,
        "memory of all processes, MiB (shared pages once)": {
            "samples": len(values),
            "spread over the pass": [round(v, 1) for v in values[:: max(1, len(values) // 40)]],
        },
        "targets": [
            common.target(
                "memory of all processes, second half of the pass over the first", growth, 1.05
            )
        ],
    }


def main() -> None:
    """Measure and write."""
    parser = common.arguments(__doc__, __file__)
    parser.add_argument("--backbone", default="timm:vit_tiny_patch16_224")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tars", type=int, default=0)
    args = common.started(parser)
    if args.tars:
        if args.out.stem == f"extract-{args.device}":
            args.out = args.out.with_name(f"extract-tars-{args.device}.json")
        with tempfile.TemporaryDirectory() as folder:
            found = measure_tars(args, Path(folder))
        common.write(args, "one pass over tars: images a second, and memory", **found)
        print(f"{found['images a second']:,.0f} images a second; {found['bottleneck']}")
        return
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args, Path(folder))
    common.write(args, "images a second of each stage of a pass, and of the whole", **found)
    for name, rate in found["images a second"].items():
        print(f"{name}: {rate['median']:,.0f} images a second")


if __name__ == "__main__":
    main()
