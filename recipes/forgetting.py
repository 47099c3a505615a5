"""What is forgotten when tasks are learned one after the other.

    python recipes/forgetting.py

Five tasks of two digits each, on the embedded backbone. Unbound tasks own their tuners, so that
learning the next cannot change them: every answer of an earlier task must be the same, exactly. For
contrast one network that is fully fine-tuned again and again, and one set of Res-Tuners shared by
all tasks; heads are each task's own everywhere. Writes `recipes/forgetting.json`; some 10 minutes
on one CPU core.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

import restuning
from restuning import FitSettings, Host
from restuning.bench.measure import describe_hardware, read_versions
from restuning.bench.studies.forgetting import learn_in_sequence
from restuning.data import Data, load_data
from restuning.data.decoded import DecodedImages, decode_once

PAIRS = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
ROWS: list[tuple[str, str, bool, dict[str, Any]]] = [
    ("res-tuning, own tuners", "res-tuning", False, {"lr": 5e-3}),
    ("res-tuning-bypass, own", "res-tuning-bypass", False, {"lr": 1e-2}),
    ("res-tuning, shared tuners", "res-tuning", True, {"lr": 5e-3}),
    ("full, one network", "full", True, {"lr": 2e-4}),
]


def pair(split: DecodedImages, classes: tuple[int, int]) -> DecodedImages:
    """The images of two classes, labelled 0 and 1."""
    chosen = (split.labels == classes[0]) | (split.labels == classes[1])
    return DecodedImages(
        split.pixels[chosen], (split.labels[chosen] == classes[1]).long(), split.normalise
    )


def main() -> None:
    """Every row, and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    backbone = restuning.load_backbone("restuning-tiny")
    host = Host(backbone.model, *backbone.example)
    rows = []
    with tempfile.TemporaryDirectory() as work:
        digits = decode_once(load_data("digits", backbone), backbone, Path(work) / "images")
        tasks = [
            Data(
                f"{a}-{b}",
                pair(digits.train.concatenate(digits.val), (a, b)),
                None,
                pair(digits.test, (a, b)),
                [str(a), str(b)],
                collate=digits.collate,
            )
            for a, b in PAIRS
        ]
        for number, (name, method, shared, own) in enumerate(ROWS):
            settings = FitSettings(epochs=args.epochs, **own)
            found = learn_in_sequence(
                host, method, tasks, settings, Path(work) / str(number), shared=shared
            )
            rows.append(
                {
                    "row": name,
                    "accuracy": found.accuracy,
                    "forgetting": found.forgetting,
                    "answers_changed": found.changed,
                    "settings": settings.to_dict(),
                }
            )
            last = sum(found.accuracy[-1]) / len(tasks)
            print(
                f"{name:28s} mean at the end {last:.2%}, forgotten {100 * found.forgetting:.2f} "
                f"points, {found.changed} answers changed",
                flush=True,
            )
    report = {
        "command": f"python recipes/forgetting.py --epochs {args.epochs}",
        "tasks": PAIRS,
        "backbone": "restuning-tiny",
        "versions": read_versions(),
        "hardware": describe_hardware(torch.device("cpu")),
        "rows": rows,
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
