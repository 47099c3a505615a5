"""Everything that a GPU changes, in one command: steps, whole runs, many tasks, sweeps, engines, rivals.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --again "engines"
    python benchmarks/gpu.py --tiny

For a GPU that is at hand for some minutes. Each row is what another benchmark of this folder
measures, at shapes that fill a GPU: ViT-B/16, a ViT of a billion parameters (ViT-g/14) and the UNet of
Stable Diffusion v1.5, with weights at random, in fp32 with the products that PyTorch's defaults make (no TF32
in matrices). A row is a process of its own with a bound of seconds, and is written as soon as it is
measured; after `--minutes` the command ends, and the same command goes on with the rows that are
missing. Memory is the allocator's peak, and times wait for the device. `--tiny` measures the same
rows at shapes of a moment, on a CPU too: it shows that the rows work, and says nothing of speed.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import engines
import many_tasks
import step
import sweep
import whole_run
from common import HERE, arguments, asked, started
from rows import Row, begin, measure_missing

import diffusion

MINUTES = 7.5
"""One call, with the seconds that it takes to begin, is over before eight minutes."""

LARGE = {
    "step": ("--model", "vit_base_patch16_224", "--batch", "64", "--steps", "20"),
    "billion": ("--model", "vit_giant_patch14_224", "--batch", "16", "--steps", "5"),
    "whole run": ("--batch", "64", "--steps", "10"),
    "many tasks": ("--models", "vit_base_patch16_224", "--batch", "32", "--rounds", "10"),
    "sweep": ("--epochs", "30", "--passes", "10"),
    "engines": ("--batch", "32", "--rounds", "10"),
    "denoiser": ("--timed", "sd15", "--batch", "4", "--rounds", "5"),
}
"""Options of each benchmark."""

TINY = {
    "step": ("--model", "test_vit", "--batch", "2", "--steps", "1"),
    "billion": ("--model", "test_vit", "--batch", "1", "--steps", "1"),
    "whole run": (
        *("--model", "test_vit", "--batch", "2", "--steps", "2"),
        *("--images", "200", "--epochs", "1"),
    ),
    "many tasks": ("--models", "test_vit", "--batch", "1", "--rounds", "1"),
    "sweep": (
        *("--model", "test_vit", "--images", "64", "--epochs", "1"),
        *("--arms", "2", "--passes", "1"),
    ),
    # With two threads nothing is compiled, which takes longer than all else.
    "engines": ("--model", "test_vit", "--batch", "1", "--rounds", "1", "--threads", "2"),
    "denoiser": ("--timed", "tiny", "--rounds", "1"),
}

BILLION = [mode for mode in step.MODES if mode not in ("linear", "ms-swift-restuning")]
DENOISER = [method for method in diffusion.METHODS if method != "bypass-3x3"]
TURNS = "in turns"


def list_rows(args: argparse.Namespace) -> list[Row]:
    """All rows, the ones that most is claimed of first."""
    shapes = TINY if args.tiny else LARGE
    steps = asked(step.options(), args, *shapes["step"])
    billion = asked(step.options(), args, *shapes["billion"])
    run = asked(whole_run.options(), args, *shapes["whole run"])
    tasks = asked(many_tasks.options(), args, *shapes["many tasks"])
    denoiser = asked(diffusion.options(), args, *shapes["denoiser"])
    name = tasks.models[0]
    return [
        *(Row(f"step/{mode}", 30, step.measure, (steps, mode)) for mode in step.MODES),
        Row(f"step/{TURNS}", 60, step.in_one_process, (steps,)),
        *(Row(f"whole run/{method}", 60, whole_run.measure, (run, method)) for method in run.rows),
        Row("many tasks/banks", 60, many_tasks.times, (tasks, name)),
        Row("many tasks/one ms-swift bypass", 30, many_tasks.swift, (tasks, name)),
        Row("sweep", 90, sweep.measure, (asked(sweep.options(), args, *shapes["sweep"]),)),
        *(Row(f"billion/{mode}", 40, step.measure, (billion, mode)) for mode in BILLION),
        *(Row(f"denoiser/{m}", 30, diffusion.measure, (denoiser, m)) for m in DENOISER),
        Row(f"denoiser/{TURNS}", 60, diffusion.times, (denoiser,)),
        Row("engines", 120, engines.measure, (asked(engines.options(), args, *shapes["engines"]),)),
    ]


def claims(rows: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the benchmarks claim, of the rows that are there."""

    def of(group: str, key: str) -> dict[str, dict[str, Any]]:
        found = [row for name, row in rows.items() if name.startswith(f"{group}/") and key in row]
        return {row[key]: dict(row) for row in found}

    runs = [
        {**row, "method": name.partition("/")[2]}
        for name, row in rows.items()
        if name.startswith("whole run/")
    ]
    found = step.claims(of("step", "mode"), rows.get(f"step/{TURNS}", {}))
    # Turns of a billion would be four networks of them in one process.
    found += [
        {**each, "what": f"a billion parameters: {each['what']}"}
        for each in step.claims(of("billion", "mode"), {})
        if "in turns" not in each["what"]
    ]
    found += whole_run.claims(runs)
    if (banks := rows.get("many tasks/banks")) is not None:
        found += many_tasks.claims(dict(banks))
    found += rows.get("sweep", {}).get("targets", [])
    return found


def options() -> argparse.ArgumentParser:
    """What can be asked for."""
    parser = arguments(__doc__, __file__)
    parser.set_defaults(device=None)
    parser.add_argument(
        "--tiny", action="store_true", help="shapes of a moment, on a CPU by default"
    )
    parser.add_argument("--again", nargs="*", default=[], metavar="ROW", help="measure these anew")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="after which no row begins")
    return parser


def main() -> None:
    """Measure the rows that are missing."""
    parser = options()
    chosen = parser.parse_args()
    device = chosen.device or ("cpu" if chosen.tiny else "cuda")
    parser.set_defaults(device=device, threads=1 if chosen.tiny else 2)
    if chosen.tiny:
        # Not among results: it measures nothing.
        parser.set_defaults(out=HERE.parent / "runs" / f"gpu-tiny-{device}.json")
    args = started(parser)
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "no GPU is here that PyTorch can use; --tiny measures the same rows on a CPU"
        )
    shapes = "shapes of a moment" if args.tiny else "ViT-B/16, ViT-g/14 and SD v1.5"
    what = f"what a GPU changes, {shapes}, fp32"
    measure_missing(args, list_rows(args), what, claims, begin(device))


if __name__ == "__main__":
    main()
