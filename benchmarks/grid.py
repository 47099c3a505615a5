"""The forecast of a grid of runs beside the measured cost of a sample of it.

    python benchmarks/grid.py

The grid of VTAB-1K is 19 tasks times 15 runs of 100 epochs. What is measured here is one task of
`--tasks` with all 15 arms, and fewer images and epochs: extraction, search and final run, by the very
functions of `restuning sweep`. The forecast of the sample is made before, from one timed forward and
one timed bank, and so is that of the whole grid.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from common import arguments, started, target, write

GRID = {"lr": [1e-3, 2e-3, 5e-3, 1e-2, 2e-2], "wd": [1e-4, 1e-3, 1e-2]}
WHOLE = {"tasks": 19, "splits": {"train": 800, "val": 200, "test": 5000}, "epochs": 100}


def main() -> None:
    """Forecast, measure, and write the JSON."""
    parser = arguments(__doc__, __file__)
    parser.add_argument("--backbone", default="timm:vit_small_patch16_224")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=64)
    args = started(parser)
    import torch

    import restuning
    from restuning import FitSettings, Host, methods
    from restuning.data import Data
    from restuning.features import build as build_store
    from restuning.features.stored import StoreOptions, key_for
    from restuning.forecast import forecast_grid
    from restuning.search.sweep import sweep
    from restuning.training.run import open_inputs
    from restuning.training.timing import measure_bank

    torch.manual_seed(0)
    loaded = restuning.load_backbone(args.backbone, random=True)
    host = Host(loaded.model, *loaded.example)
    classes, arms = 10, len(GRID["lr"]) * len(GRID["wd"])
    shape = loaded.example[0].shape[1:]

    class Noise(torch.utils.data.Dataset):
        def __init__(self, count: int, first: int) -> None:
            self.count, self.first = count, first

        def __len__(self) -> int:
            return self.count

        def __getitem__(self, index: int) -> tuple[Any, int]:
            generator = torch.Generator().manual_seed(self.first + index)
            return torch.randn(shape, generator=generator), index % classes

    splits = {"train": args.images, "val": args.images // 4, "test": args.images // 2}

    def build() -> Any:
        return methods.build("res-tuning-bypass", host, num_classes=classes)

    data = Data(
        "noise",
        *(Noise(n, 1000 * i) for i, n in enumerate(splits.values())),
        [str(c) for c in range(classes)],
        identity="noise",
    )
    start = time.perf_counter()
    for index in range(16):
        data.train[index]
    read = (time.perf_counter() - start) / 16
    start = time.perf_counter()
    bank, single = (
        measure_bank(
            host,
            build,
            loaded.example,
            arms=k,
            batch=args.batch,
            classes=classes,
            read=read,
            evaluated=splits["val"],
        )
        for k in (arms, 1)
    )
    timing = time.perf_counter() - start
    told = forecast_grid(
        bank,
        splits,
        tasks=1,
        arms=arms,
        epochs=args.epochs,
        batch=args.batch,
        finals=1,
        single=single,
    )
    print(f"forecast of the sample: {told.to_dict()}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        # Without the size and time that `stored` shows before: two forwards, whatever the data.
        key = key_for(host, loaded, data, build().needs(host.readout_rule))
        parts = {("train", 0): data.train, ("val", 0): data.val, ("test", 0): data.test}
        store = build_store(host, key, Path(folder) / "stores", parts)
        features = time.perf_counter() - start
        inputs = open_inputs(host, loaded, data, StoreOptions(store.path.parent))
        start = time.perf_counter()
        sweep(
            inputs,
            "res-tuning-bypass",
            GRID,
            seeds=[0],
            settings=FitSettings(epochs=args.epochs, batch_size=args.batch),
            out=Path(folder) / "sweep",
        )
        runs = time.perf_counter() - start
    whole = forecast_grid(
        bank,
        WHOLE["splits"],
        tasks=WHOLE["tasks"],
        arms=arms,
        epochs=WHOLE["epochs"],
        batch=args.batch,
        finals=1,
        single=single,
    )
    error = told.seconds / (features + runs) - 1
    write(
        args,
        "cost of a grid: forecast beside a measured sample",
        backbone=args.backbone,
        sample={"splits": splits, "epochs": args.epochs, "batch": args.batch, "arms": arms},
        measured={"features": features, "search_and_final": runs, "seconds": features + runs},
        forecast=told.to_dict(),
        error=error,
        rates=vars(bank),
        rates_single=vars(single),
        timing_seconds=timing,
        whole={**WHOLE, "arms": arms, "forecast": whole.to_dict()},
        targets=[target("error of the forecast of a sweep's cost", abs(error), 0.25)],
    )


if __name__ == "__main__":
    main()
