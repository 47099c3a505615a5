"""Kinds of input that may come from anybody: how a valid one is made, and how it is read to an answer.

A new kind is a row of `KINDS`. `make` writes a valid folder; number 0, 1, ... are different ones.
`read` gives the answer as plain values, compared with `==`. Where a file is the only record of what
it says (an image, a csv), a change of it is another valid input: there `read` gives a pair of the
identity that the library knows the input by, and the answer, and whenever the answer is another
one the identity must be.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

AGAIN = "is made again"
"""Of a result that is not there: the same command makes it, with the same numbers."""
VARIANTS = 4


@dataclass(frozen=True)
class Kind:
    """One row.

    Attributes:
        make: Writes valid folder number `variant`.
        read: The answer of a folder, as of the variant.
        count: Changed folders of the whole fuzz.
        quick: Those of the quick suite.
        identified: Answers are pairs, see above.
        waits: For what, if it is known that it does not hold yet.
    """

    make: Callable[[Path, int], None]
    read: Callable[[Path, int], Any]
    count: int
    quick: int
    identified: bool = False
    waits: str = ""


# ------------------------------------------------------------------ tasks

METHODS = ("res-tuning-bypass", "linear", "res-tuning", "mixing-bypass")


@cache
def backbone():
    import restuning

    return restuning.load_backbone("restuning-tiny")


@cache
def host():
    return backbone().host()


def make_task(folder: Path, variant: int) -> None:
    import torch

    from restuning import methods
    from restuning.task import save

    torch.manual_seed(variant)
    task = methods.build(METHODS[variant], host(), num_classes=3)
    for parameter in task.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    task.labels = ["a", "b", f"c{variant}"]
    save(
        task,
        host(),
        folder,
        backbone="restuning-tiny",
        preprocessing=backbone().preprocessing.to_dict(),
    )


@cache
def images():
    import torch

    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def read_task(folder: Path, variant: int) -> Any:
    import restuning

    task = restuning.load(folder, host())
    tuned = restuning.Tuned(host(), task)
    return tuned(images()).tolist(), list(task.labels)


def read_predictor(folder: Path, variant: int) -> Any:
    import numpy as np

    from restuning import Predictor

    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    (answer,) = Predictor.load(folder)(pixels)
    prediction = next(iter(answer.predictions.values()))
    return prediction.label, prediction.probabilities.tolist()


# ------------------------------------------------------------------ stores

STORED = (("fp32", "cls"), ("int8", "cls"), ("fp32", "all"), ("bf16", "cls"))
SPLITS = {"train": 12, "val": 4}


def make_store(folder: Path, variant: int) -> None:
    from store_script import Noise, host_and_key

    from restuning.features import build

    dtype, tokens = STORED[variant]
    owner, key = host_and_key(dtype, splits=SPLITS, tokens=tokens)
    parts = {("train", 0): Noise(12), ("val", 0): Noise(4)}
    made = build(owner, key, folder.parent / "made", parts, batch_size=4, progress=False)
    made.path.rename(folder)


def read_store(folder: Path, variant: int) -> Any:
    from restuning.features import Store

    store = Store(folder)
    rows = {s: store.rows(s, 0, range(n)).tolist() for s, n in store.key.splits.items()}
    labels = {s: store.labels(s).tolist() for s in store.key.splits}
    return store.key.to_dict(), rows, labels, store.manifest["error"]


def make_unfinished(folder: Path, variant: int) -> None:
    make_store(folder, variant)
    (folder / "manifest.json").unlink()
    (folder / "val.0.00000000.json").unlink()


def read_unfinished(folder: Path, variant: int) -> Any:
    """What is left of it is gone on with under its own name."""
    from store_script import Noise, host_and_key

    from restuning.features import build, place

    dtype, tokens = STORED[variant]
    owner, key = host_and_key(dtype, splits=SPLITS, tokens=tokens)
    root = folder.parent / f"root-{folder.name}"
    parts = {("train", 0): Noise(12), ("val", 0): Noise(4)}
    try:
        root.mkdir()
        folder.rename(place(root, key))
        build(owner, key, root, parts, batch_size=4, progress=False)
        return read_store(place(root, key), variant)
    finally:
        shutil.rmtree(root, ignore_errors=True)


# ------------------------------------------------------------------ table


KINDS = {
    "task": Kind(make_task, read_task, 850, 8),
    "task with the backbone it names": Kind(make_task, read_predictor, 150, 2),
    "store": Kind(make_store, read_store, 240, 8),
    "unfinished store": Kind(make_unfinished, read_unfinished, 60, 2),
}
