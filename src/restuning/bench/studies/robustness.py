"""How the trained tasks of a grid answer under corruptions and attacks."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from restuning._files import read_json, write_json
from restuning.bench.bench import Bench
from restuning.bench.folder import FORMAT
from restuning.bench.grid import GridRun
from restuning.bench.report.tables import Table
from restuning.bench.studies.attacks import fgsm, pgd
from restuning.bench.studies.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from restuning.bench.studies.load_trained import load_trained
from restuning.data.decoded import DecodedImages

IMAGES = 256
"""Number of test images, spread evenly over the split: a share of right answers is then known to about three points."""

RADII = (1.0, 2.0, 4.0)
"""Radii of the attacks, in 255ths of the range of a pixel."""

BATCH = 64


def robustness(
    bench: Bench,
    run: GridRun,
    images: int = IMAGES,
    severities: Sequence[int] = SEVERITIES,
    radii: Sequence[float] = RADII,
) -> dict[str, Any]:
    """Accuracy of a kept task on clean, corrupted and attacked test images, as JSON.

    Left in `robustness/RUN.json` of the grid; what is there is not made again.

    Raises:
        FormatError: The run's task was not kept.
    """
    file = bench.folder / "robustness" / f"{run.name}.json"
    conditions = {"images": images, "severities": list(severities), "radii": list(radii)}
    if file.exists():
        earlier = read_json(file)
        # Other images, severities or radii are another measurement.
        if all(earlier.get(k) == v for k, v in conditions.items()):
            return earlier
    tuned, trained = load_trained(bench, run)
    test: DecodedImages = bench.data(run.task).apart.test
    places = (
        # Spread evenly: test splits are often sorted by class.
        [n * len(test) // images for n in range(images)] if images < len(test) else range(len(test))
    )
    pixels, labels = test.pixels[list(places)], test.labels[list(places)]

    # Normalised after the change: corruptions and attacks are of pixels.
    def share(changed: Callable[[Tensor, Tensor], Tensor]) -> float:
        right = sum(
            int((predict_classes(tuned, test.normalise(changed(x, y))) == y).sum())
            for x, y in _batches(pixels, labels)
        )
        return right / len(labels)

    result = {
        "format": FORMAT,
        "task": run.task.name,
        "group": run.task.group,
        "label": run.entry.label,
        "seed": run.seed,
        "test_accuracy": trained["accuracy"],
        **conditions,
        "clean": share(lambda x, y: x),
        "corruptions": {
            kind: [share(lambda x, y, k=kind, s=s: corrupt(x, k, s)) for s in severities]
            for kind in CORRUPTIONS
        },
        "fgsm": [share(lambda x, y, r=r: fgsm(tuned, x, y, test.normalise, r)) for r in radii],
        "pgd": [share(lambda x, y, r=r: pgd(tuned, x, y, test.normalise, r)) for r in radii],
    }
    write_json(file, result, sealed=True)
    return result


def predict_classes(tuned: nn.Module, images: Tensor) -> Tensor:
    """The classes a model answers with, `b`."""
    with torch.no_grad():
        return tuned(images).argmax(1)


def _batches(pixels: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(labels), BATCH):
        yield pixels[start : start + BATCH], labels[start : start + BATCH]


def tabulate_robustness(folder: Path) -> Table:
    """Mean accuracy by method over the tasks and seeds that were attacked."""
    results = [read_json(f) for f in sorted((folder / "robustness").rglob("*.json"))]
    labels = list(dict.fromkeys(r["label"] for r in results))
    radii = results[0]["radii"] if results else []
    rows = []
    for label in labels:
        runs = [r for r in results if r["label"] == label]

        def mean(values: Sequence[float]) -> str:
            return f"{100 * statistics.mean(values):.1f}"

        corrupted = [v for r in runs for each in r["corruptions"].values() for v in each]
        # Severities rise, so the last is the worst.
        severest = [each[-1] for r in runs for each in r["corruptions"].values()]
        row = [
            label,
            str(len(runs)),
            mean([r["clean"] for r in runs]),
            mean(corrupted),
            mean(severest),
        ]
        for kind in ("fgsm", "pgd"):
            row += [mean([r[kind][n] for r in runs]) for n in range(len(radii))]
        rows.append(row)
    tasks = sorted({r["task"] for r in results})
    columns = ["method", "runs", "clean", "corrupted", "severest"]
    columns += [f"{kind.upper()} {r:g}/255" for kind in ("fgsm", "pgd") for r in radii]
    covers = (
        f"Accuracy in %, {', '.join(tasks)}; {results[0]['images'] if results else 0} test images "
        f"at most of each; {len(CORRUPTIONS)} corruptions of ImageNet-C in severities "
        f"{results[0]['severities'] if results else []}; attacks are white-box, also through what "
        "a method detaches."
    )
    return Table("Robustness", covers, columns, rows)
