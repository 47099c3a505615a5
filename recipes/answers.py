"""Every kind of answer on drawn scenes whose truth is known, from one pass over the images each.

    python recipes/answers.py

ViT-Ti (AugReg) at 224 px, 400 scenes (280 train, 40 validation, 80 test) with three columns of answers:
the ground (one class), the shapes that are there (labels), and how many there are (a number); and 400 dials whose
hand has an angle; and 400 scenes with masks (ground and four shapes), and 400 yards with the distance of each pixel. Trained with `ridge` and with `ensemble`, which is taken where nothing is known. Beside the figures of
the test split stand those of the best constant answer: the share of the commonest class, the mean frequency
of labels (which is the mean average precision of any constant), 0 for R2, and the mean IoU of ground everywhere. Masks and depths are
trained with `linear`, `ridge` and `mixing-bypass`, masks with `ensemble` as well, 12 epochs where there are steps. All of it three times: a seed draws other
scenes, splits them and trains. Writes `recipes/answers.json` after each run, with mean and standard deviation of all seeds and what each was made by;
`--add` goes on with what is not there yet, about a quarter of an hour a seed on one core.

Expected: mean average precision far above the constant, R2 of count and angle at least 0.8; the mean IoU of `mixing-bypass`
five points or more above that of `linear`; R2 of depths above that of `linear` with both others.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from scenes import write_depths, write_masks, write_table

import restuning
from restuning.data.targets import list_targets
from restuning.training.run import Source

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("RESTUNING_DATA", ROOT.parent / "shared" / "data"))
WEIGHTS = DATA / "weights" / "vit_tiny_patch16_224.safetensors"
TABLES = {"scenes": ("ground", "shapes", "count"), "dials": ("angle",)}
PIXELS = {"masks": write_masks, "depth": write_depths}
SEEDS = (0, 1, 2)
RUNS = (
    *(f"{table},{method}" for table in TABLES for method in ("ridge", "ensemble")),
    *(f"{name},{method}" for name in PIXELS for method in ("linear", "ridge", "mixing-bypass")),
    "masks,ensemble",
)
EPOCHS = 12
"""Of heads on masks and depths."""


def main() -> None:
    """Both tables with both methods; a line each, and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--runs", nargs="*", default=RUNS, metavar="TABLE,METHOD")
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    parser.add_argument("--out", type=Path, default=Path("runs/answers"))
    parser.add_argument("--report", type=Path, default=ROOT / "recipes" / "answers.json")
    parser.add_argument("--add", action="store_true", help="Keep what the report has of other runs")
    arguments = parser.parse_args()
    backbone = restuning.load_backbone("timm:vit_tiny_patch16_224", weights=WEIGHTS)
    forwards: list[int] = []
    backbone.model.register_forward_hook(lambda _, args, __: forwards.append(len(args[0])))
    results: dict[str, Any] = {}
    if arguments.add and arguments.report.is_file():
        results = json.loads(arguments.report.read_text())["results"]
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            for run in arguments.runs:
                name, method = run.split(",")
                key = f"{name}, {method}"
                if str(seed) in results.get(key, {}).get("seeds", {}):
                    continue
                if not (place := Path(folder) / name).exists():
                    # Two tables of one seed are not of the same pictures.
                    number = len(TABLES) * seed + [*TABLES, *PIXELS].index(name) % len(TABLES)
                    draw(place, name, arguments.rows, number)
                forwards.clear()
                train = train_table if name in TABLES else train_pixels
                made = train(place, method, backbone, arguments.out / str(seed), seed)
                if name in TABLES:
                    # Few images at a time are those by which sites and rounding are proved.
                    made["images through the backbone"] = sum(n for n in forwards if n > 4)
                results.setdefault(key, {"seeds": {}})["seeds"][str(seed)] = made
                keep(key, results, arguments)
    for name, result in results.items():
        for column, told in result["columns"].items():
            print(f"{name}, {column}: {told}")


def draw(folder: Path, name: str, rows: int, seed: int) -> None:
    """A table or a folder of pictures at the backbone's size."""
    if name in TABLES:
        write_table(folder, rows, 224, seed, dial=name == "dials")
    else:
        PIXELS[name](folder, rows, 224, seed)


def train_table(folder: Path, method: str, backbone: Any, out: Path, seed: int) -> dict[str, Any]:
    """One method on all columns of a table, from one pass; an entry of the report."""
    columns, table = TABLES[folder.name], folder / "table.csv"
    start = time.perf_counter()
    found = restuning.train(
        table,
        backbone=backbone,
        method=method,
        image="path",
        label=list(columns),
        out=out / f"{folder.name}-{method}",
        store=folder.parent / f"stores-{method}",
        resume=False,
        seed=seed,
        log=lambda line: print(line, flush=True),
    )
    seconds = round(time.perf_counter() - start, 1)
    constants = find_constants(table, columns, backbone)
    runs = getattr(found, "runs", {columns[0]: found})
    return {
        "seconds": seconds,
        "columns": {c: describe(each, constants[c]) for c, each in runs.items()},
    }


def train_pixels(folder: Path, method: str, backbone: Any, out: Path, seed: int) -> dict[str, Any]:
    """One method on a folder of masks or depths; an entry of the report."""
    start = time.perf_counter()
    found = restuning.train(
        folder,
        backbone=backbone,
        method=method,
        out=out / f"{folder.name}-{method}",
        store=folder.parent / f"stores-{folder.name}",
        resume=False,
        seed=seed,
        log=lambda line: print(line, flush=True),
        **({} if method == "ridge" else {"epochs": EPOCHS}),
    )
    data, constant = Source(str(folder)).load(backbone), 0.0
    if data.problem.chooses:
        masks = torch.stack(list_targets(data.test))
        ground = torch.zeros(*masks.shape, data.num_classes)
        ground[..., 0] = 1
        constant = data.problem.measure(ground, masks) or 0.0
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "columns": {"mask" if data.problem.chooses else "depth": describe(found, constant)},
    }


def keep(name: str, results: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Write a run into the JSON of those before it, with mean and deviation of its seeds and what it was made by."""
    # Where runs and report are left makes no difference to them.
    command = ["python", "recipes/answers.py"] + ["--add"] * arguments.add
    command += ["--rows", str(arguments.rows)] + ["--runs", *arguments.runs]
    command += ["--seeds", *map(str, arguments.seeds)]
    seeds = list(results[name]["seeds"].values())
    results[name] |= {
        "columns": {
            column: {
                metric: spread([each["columns"][column]["test"][metric] for each in seeds])
                for metric in told["test"]
            }
            | {"constant": spread([each["columns"][column]["constant"] for each in seeds])}
            for column, told in seeds[0]["columns"].items()
        },
        "rows": arguments.rows,
        "command": shlex.join(command),
        "versions": {n: version(n) for n in ("torch", "timm", "torchmetrics")},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    arguments.report.write_text(json.dumps({"results": results}, indent=1) + "\n")


def spread(values: list[float]) -> dict[str, float]:
    """Mean and standard deviation over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": round(statistics.mean(values), 4), "std": round(deviation, 4)}


def describe(run: Any, constant: float) -> dict[str, Any]:
    """The figures of one column."""
    error = getattr(run.task.problem, "error", None)
    told = {"error bar": error if isinstance(error, float) else error[0]} if error else {}
    return {
        "problem": run.metrics["problem"],
        "test": {name: round(value, 4) for name, value in run.metrics["test"].items()},
        "constant": round(constant, 4),
        **told,
    }


def find_constants(table: Path, columns: tuple[str, ...], backbone: Any) -> dict[str, float]:
    """The figure of the best constant answer to the test split, by column."""
    found = {}
    for column in columns:
        data = Source(str(table), image="path", label=column).load(backbone)
        targets = list_targets(data.test)
        if data.problem.kind == "regression":
            found[column] = 0.0
        elif data.problem.kind == "multi-label":
            found[column] = float(torch.stack(targets).mean())
        else:
            found[column] = max(map(targets.count, targets)) / len(targets)
    return found


if __name__ == "__main__":
    main()
