"""The paper's benchmarks of images on ViT-B/16: every figure of ours beside the published one.

    python recipes/paper/suites.py cifar100 --weights vit_b16_in21k.safetensors
    python recipes/paper/suites.py vtab-1k --data DIR --weights vit_b16_in21k.safetensors
    python recipes/paper/suites.py fgvc --data DIR --weights vit_b16_in21k.safetensors
    python recipes/paper/suites.py cifar100 --ablation combinations --weights ...

Needs what cannot be shipped: the data (`docs/bench.md` says where they come from and how they are laid
out; `restuning bench check SUITE DIR` says what is missing), the weights of ImageNet-21k (timm's
`vit_base_patch16_224.orig_in21k`, fetched where there is a hub and no `--weights`), and a GPU, which is used
where there is one. A killed command goes on where it was; `--show` draws the table from what is there.

The paper does not print its optimiser, rates and epochs. Ours: AdamW, 100 epochs, batch 64, cosine; the
rate is one of two and chosen on the validation split with one seed, then both splits are trained
on with three seeds and the last checkpoint is tested once. The published row of Res-Tuning on FGVC could not be
read: U-Tuning's, by the same authors, stands beside ours.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from restuning import RestuningError
from restuning._files import replacing
from restuning.bench import (
    Entry,
    Event,
    GridProtocol,
    Job,
    find_tasks,
    list_runs,
    open_grid,
    parse_entries,
    run_grid,
)
from restuning.bench.entries import is_detached
from restuning.bench.report import Summary, published_tables, summarise, words
from restuning.bench.studies.ablations import ablation_entries
from restuning.training import FitSettings

BACKBONE = "timm:vit_base_patch16_224.orig_in21k"
FIRST = "linear,res-tuning,res-tuning-bypass"
BYPASS, SIDE = "res-tuning-bypass", "side-tuning:pretrained=true"
# The paper's own port of LST has about the parameters of this reduction.
LADDER = "lst:reduction=16"

METHODS = {
    "cifar100": {
        "full": "Full",
        "linear": "Linear",
        "adaptformer": "AdaptFormer",
        "res-tuning": "Res-Tuning",
        SIDE: "Side-Tuning",
        LADDER: "LST",
        BYPASS: "Res-Tuning-Bypass",
    },
    "vtab-1k": {
        "full": "Full",
        "linear": "Linear",
        "adapter": "Adapter",
        "lora": "LoRA",
        "vpt-deep": "VPT-Deep",
        "ssf": "SSF",
        "res-tuning": "Res-Tuning",
        SIDE: "Side-Tuning",
        LADDER: "LST†",
        BYPASS: "RT-Bypass",
    },
    "fgvc": {
        "full": "Full",
        "linear": "Linear",
        "bitfit": "BitFit",
        "prefix": "Prefix",
        "adapter": "Adapter",
        "vpt-shallow": "VPT-Shallow",
        "vpt-deep": "VPT-Deep",
        "res-tuning": "U-Tuning",
    },
    "bypass": {
        "linear": "linear probing",
        "bypass-horizontal": "horizontal",
        "bypass-vertical": "vertical",
        BYPASS: "both",
    },
    "original-unbound": {
        "prefix unbound": "Res-Prefix (mha)",
        "prompt unbound": "Res-Prompt (mha)",
        "adapter unbound": "Res-Adapter (ffn)",
    },
}
"""By published table: the published row of each method that has one."""

COLUMNS = {
    "vtab-1k": {
        "cifar": "CIFAR-100",
        "caltech101": "Caltech101",
        "dtd": "DTD",
        "oxford_flowers102": "Flowers102",
        "oxford_iiit_pet": "Pets",
        "svhn": "SVHN",
        "sun397": "Sun397",
        "patch_camelyon": "Camelyon",
        "eurosat": "EuroSAT",
        "resisc45": "Resisc45",
        "diabetic_retinopathy": "Retinopathy",
        "clevr_count": "Clevr-Count",
        "clevr_dist": "Clevr-Dist",
        "dmlab": "DMLab",
        "kitti": "KITTI-Dist",
        "dsprites_loc": "dSpr-Loc",
        "dsprites_ori": "dSpr-Ori",
        "smallnorb_azi": "sNORB-Azim",
        "smallnorb_ele": "sNORB-Elev",
    },
    "fgvc": {
        "cub": "CUB",
        "nabirds": "NABirds",
        "flowers": "Flowers",
        "cars": "Cars",
        "dogs": "Dogs",
    },
}
"""By suite: the published column of each task, by the name of its folder."""

ABLATIONS = ("combinations", "bypass", "original-unbound")
RATES = {"full": [1e-4, 3e-4], "linear": [5e-3, 3e-2]}
BESIDE, INSIDE = [3e-3, 1e-2], [1e-3, 5e-3]
"""Rates to choose from: around the defaults of each kind of method."""


def published_row(table: str, label: str) -> str | None:
    """The name of the published row that a method of ours is compared with; None where there is none."""
    if table == "combinations":
        inside = label.removeprefix("res-tuning[").removesuffix("]").replace(",", ", ")
        return inside if inside in published_tables()[table]["rows"] else None
    return METHODS[table].get(label)


def published(table: str, label: str, column: str) -> float | None:
    """One published figure; None where the paper prints none."""
    rows = published_tables()[table]
    name = published_row(table, label)
    if name is None or column not in rows["columns"]:
        return None
    return rows["rows"][name][rows["columns"].index(column)]


def beside(ours: str, theirs: float | None) -> str:
    """A cell: ours, then the published figure."""
    return f"{ours} / {'-' if theirs is None else f'{theirs:g}'}"


def verdict(ours: float | None, theirs: float | None) -> str:
    """Whether ours reaches the published figure, to the digit that is printed."""
    if ours is None or theirs is None:
        return "-"
    return "reached" if round(100 * ours, 2) >= theirs else "MISSED"


def tabulate(summary: Summary, table: str, labels: Sequence[str]) -> str:
    """Ours / published: a row a task, then means, parameters, and whether the published figure is reached.

    Args:
        summary: Of the grid.
        table: A suite, or an ablation.
        labels: Columns.
    """
    columns = COLUMNS.get(table, {})
    names = {task: columns.get(task, "accuracy") for task in columns or summary.tasks}
    lines = []
    for task, column in names.items():
        cells = [
            beside(
                words.format_cell(summary.cells.get((task, label))), published(table, label, column)
            )
            for label in labels
        ]
        lines.append([task, *cells])
    means = _means(summary, table, list(names))
    for name, (column, of) in means.items():
        ours = [_mean_of(summary, label, names, of) for label in labels]
        theirs = [published(table, label, column) for label in labels]
        shown = ["-" if o is None else words.format_percent(o) for o in ours]
        if len(names) > 1:
            lines.append([name, *(beside(s, t) for s, t in zip(shown, theirs, strict=True))])
        last = [verdict(o, t) for o, t in zip(ours, theirs, strict=True)]
    sizes = [_parameters(summary, label, names) for label in labels]
    lines.append(
        [
            "trained, M, with head",
            *(
                beside("-" if s is None else f"{s / 1e6:.2f}", published(table, label, "params M"))
                for s, label in zip(sizes, labels, strict=True)
            ),
        ]
    )
    lines.append([f"published {name} reached?", *last])
    head = ["ours / published", *labels]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


Mean = Callable[[Summary, str, Sequence[str]], float]


def _means(summary: Summary, table: str, tasks: list[str]) -> dict[str, tuple[str, Mean]]:
    """Means by name: the published column, and how ours is taken. The last decides."""

    def plain(summary: Summary, label: str, tasks: Sequence[str]) -> float:
        return statistics.mean(summary.cells[task, label].mean for task in tasks)

    if table == "vtab-1k":
        return {
            "mean of tasks": ("mean of tasks", plain),
            "mean of groups": ("mean of groups", Summary.mean_of_groups),
        }
    return {
        "mean" if len(tasks) > 1 else "accuracy": ("mean" if table == "fgvc" else "accuracy", plain)
    }


def _mean_of(summary: Summary, label: str, tasks: Any, of: Mean) -> float | None:
    # A mean over fewer tasks is another figure.
    if any((task, label) not in summary.cells for task in tasks):
        return None
    return of(summary, label, list(tasks))


def _parameters(summary: Summary, label: str, tasks: Any) -> float | None:
    counts = [
        run["parameters"]["trained"]
        for task in tasks
        if (task, label) in summary.cells
        for run in summary.cells[task, label].runs.values()
    ]
    return statistics.mean(counts) if counts else None


def choices_for(entries: Sequence[Entry]) -> dict[str, dict[str, list[float]]]:
    """The rates that each method chooses from, by its label."""
    return {
        entry.label: {"lr": RATES.get(entry.method, BESIDE if is_detached(entry) else INSIDE)}
        for entry in entries
    }


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=["cifar100", "vtab-1k", "fgvc"])
    parser.add_argument(
        "--data",
        type=Path,
        help="folder of the suite; default $RESTUNING_DATA/SUITE, torchvision's",
    )
    parser.add_argument("--backbone", default=BACKBONE)
    parser.add_argument("--weights", type=Path, help="file, on machines without a hub")
    parser.add_argument("--methods", default=FIRST, help="'all': whatever has a published row")
    parser.add_argument("--ablation", choices=ABLATIONS, help="a table of CIFAR-100, for --methods")
    parser.add_argument("--tasks", default="", help="names with commas; default all")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="default runs/paper/SUITE")
    parser.add_argument("--show", action="store_true", help="train nothing, show what is there")
    args = parser.parse_args(arguments)
    if args.ablation and args.suite != "cifar100":
        parser.error("--ablation draws tables of CIFAR-100: give cifar100")
    return args


def carry_out(args: argparse.Namespace) -> str:
    """Make the runs that are missing; the table of all there are.

    Raises:
        RestuningError: Data or weights are not there, or the folder is another grid's.
    """
    table = args.ablation or args.suite
    out = args.out or Path("runs/paper") / table
    methods = ",".join(METHODS[args.suite]) if args.methods == "all" else args.methods
    entries = ablation_entries(args.ablation) if args.ablation else parse_entries(methods)
    if not args.show:
        protocol = GridProtocol(
            args.backbone,
            str(args.weights) if args.weights else None,
            FitSettings(
                epochs=args.epochs,
                batch_size=args.batch_size,
                precision="bf16" if torch.cuda.is_available() else "no",
            ),
            choices_for(entries),
        )
        # Whole: a folder may bear the name of a suite, which stands for a place of its own.
        tasks = find_tasks(
            str(args.data.absolute()) if args.data else args.suite,
            [t for t in args.tasks.split(",") if t],
        )
        runs = list_runs(protocol, tasks, entries, args.seeds)
        print(
            f"{len(runs)} runs, {len(open_grid(out, protocol, runs))} to make, in {out}", flush=True
        )
        failed = run_grid(Job(protocol, out, runs, threads=torch.get_num_threads()), listen=tell)
        if failed:
            print(f"{failed} runs failed: their files in {out / 'runs'} say why")
    text = tabulate(summarise(out), table, [entry.label for entry in entries])
    source = f"Published: {published_tables()[table]['source']}."
    with replacing(out / "ours_and_published.md") as place:
        place.write_text(f"{text}\n\n{source}\n", encoding="utf-8")
    return f"{text}\n\n{source}"


def tell(event: Event) -> None:
    """A line for each run that ends."""
    if event.kind not in ("start", "end"):
        score = "" if event.accuracy is None else f" {event.accuracy:.2%}"
        print(f"{event.kind}{score}  {event.what}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Carry out a suite and print its table."""
    try:
        print(carry_out(read_arguments(arguments)))
    except RestuningError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
