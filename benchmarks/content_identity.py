"""What it costs to know images by their contents, beside computing their features once.

    python benchmarks/content_identity.py

A folder of small JPEGs of random colours, ViT-Ti with random weights at its own 224 pixels. Four
times, of the processor, all of one process: digests of all files that nobody has read before; the same
in the next process, which remembers them (what this one remembers is forgotten, the file that it left
is read); a comparison before each shard is written; and the extraction of which they are a share. The
digests are taken in turns, several times; the extraction once.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import arguments, started, target, write


def processor_seconds(work: Callable[[], Any]) -> float:
    """Of all threads of this process."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def main() -> None:
    """Measure and write the JSON."""
    parser = arguments(__doc__, __file__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--side", type=int, default=96, help="of an image in pixels")
    parser.add_argument("--rounds", type=int, default=9)
    args = started(parser)

    import numpy as np
    from PIL import Image

    import restuning
    from restuning import Needs, _files, load_data
    from restuning.data import digests
    from restuning.data.identity import Watch
    from restuning.features import StoreOptions, open_or_build

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as root:
        os.environ["RESTUNING_CACHE"] = str(Path(root) / "cache")
        for number in range(args.images):
            file = Path(root) / "images" / "ab"[number % 2] / f"{number:05}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (args.side, args.side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(file, quality=90)
        # Files that were just written are not remembered.
        time.sleep(_files.SETTLED + 1)
        digests.WORTH_KEEPING = 0
        backbone = restuning.load_backbone("timm:vit_tiny_patch16_224", random=True)
        host = backbone.host()
        data = load_data(str(Path(root) / "images"), backbone)

        def forget() -> None:
            _files._digests.clear()

        times: dict[str, list[float]] = {"first": [], "remembered": [], "compared": []}
        watches = [Watch(split) for split in (data.train, data.val, data.test)]
        for _ in range(args.rounds):
            forget()
            shutil.rmtree(Path(root) / "cache" / digests.MEMO, ignore_errors=True)
            times["first"].append(processor_seconds(data.contents))
            forget()
            times["remembered"].append(processor_seconds(data.contents))
            times["compared"].append(
                processor_seconds(lambda: [watch.check() for watch in watches])
            )
        forget()
        shutil.rmtree(Path(root) / "cache" / digests.MEMO, ignore_errors=True)
        options = StoreOptions(Path(root) / "stores", progress=False)
        needs = Needs(host.sites.taps, "cls")
        extraction = processor_seconds(lambda: open_or_build(host, backbone, data, needs, options))
        size = sum(file.stat().st_size for file in (Path(root) / "images").rglob("*.jpg"))
    seconds = {name: statistics.median(each) for name, each in times.items()}
    first = (seconds["first"] + seconds["compared"]) / extraction
    again = (seconds["remembered"] + seconds["compared"]) / extraction
    write(
        args,
        f"identity by contents of {args.images:,} JPEGs of {args.side} pixels, ViT-Ti at 224",
        images=args.images,
        bytes=size,
        seconds={**seconds, "extraction": extraction},
        targets=[
            target("share of extraction, files that nobody has read", first, 0.03),
            target("share of extraction, files that are remembered", again, 0.03),
        ],
    )


if __name__ == "__main__":
    main()
