"""All rows that are there as one table, as `results.json`, and as one picture.

    python recipes/image_generation/table.py

Means and standard deviations over seeds, and for every seed whether the orders hold that the method
claims: inline Res-Tuning against LoRA, the bypass against LoRA on the style.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import judging
import parts
import shapes
import torch
from PIL import Image, ImageDraw

SHOWN = {
    "frozen": "base",
    "full": "full",
    "LoRA r8": "LoRA",
    "res-tuning": "Res-Tuning",
    "bypass": "bypass",
}
KEYS = ("epsilon_error", "attribute_accuracy", "fd_judge", "cpu_seconds_a_step")
COLUMNS, SCALE, MARGIN, GAP = 6, 2, 72, 3


def read(out: Path) -> list[dict[str, Any]]:
    """All rows, in the order of methods."""
    rows = [json.loads(f.read_text()) for f in (out / "rows").glob("*.json")]
    order = [*SHOWN]
    return sorted(
        rows,
        key=lambda r: (
            r["network"],
            r["shift"] != "style",
            order.index(r["method"]) if r["method"] in order else len(order),
            r["method"],
            r["seed"],
        ),
    )


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread over seeds."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["network"], row["shift"], row["method"]), []).append(row)
    lines = []
    for (network, shift, method), same in groups.items():
        line: dict[str, Any] = {
            "network": network,
            "shift": shift,
            "method": method,
            "seeds": len(same),
        }
        for key in KEYS:
            values = [r[key] for r in same]
            line[key] = {
                "mean": statistics.mean(values),
                "sd": statistics.stdev(values) if len(values) > 1 else None,
            }
        for key in ("trained_parameters", "saved_for_backward_bytes"):
            line[key] = same[0][key]
        lines.append(line)
    return lines


def orders(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every network, shift and seed: who is better than LoRA, and in what."""
    of = {(r["network"], r["shift"], r["seed"], r["method"]): r for r in rows}
    found = []
    for (network, shift, seed, method), lora in of.items():
        for other in ("res-tuning", "bypass") if method == "LoRA r8" else ():
            ours = of.get((network, shift, seed, other))
            if ours is None:
                continue
            found.append(
                {
                    "network": network,
                    "shift": shift,
                    "seed": seed,
                    "method": other,
                    "error_lower": ours["epsilon_error"] < lora["epsilon_error"],
                    "attributes_at_least": ours["attribute_accuracy"] >= lora["attribute_accuracy"],
                    "distance_lower": ours["fd_judge"] < lora["fd_judge"],
                    "no_more_parameters": ours["trained_parameters"] <= lora["trained_parameters"],
                    "of_its_memory": ours["saved_for_backward_bytes"]
                    / lora["saved_for_backward_bytes"],
                }
            )
    return found


def markdown(lines: list[dict[str, Any]]) -> str:
    """The table of the README."""
    heads = (
        "network, shift",
        "method",
        "seeds",
        "error of noise",
        "attributes",
        "FD_judge",
        "trained",
        "saved for backward",
        "CPU s a step",
    )
    text = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for line in lines:
        error, right, apart, seconds = (
            _spread(line[k], d) for k, d in zip(KEYS, (4, 3, 0, 2), strict=True)
        )
        trained, saved = line["trained_parameters"], line["saved_for_backward_bytes"]
        cost = (
            f"{trained / 1e3:.0f} k | {saved / 2**20:.0f} MiB | {seconds.split(' ')[0]}"
            if trained
            else " | | "
        )
        text.append(
            f"| {line['network']}, {line['shift']} | {line['method']} | {line['seeds']} | "
            f"{error} | {right} | {apart} | {cost} |"
        )
    return "\n".join(text)


def _spread(value: dict[str, float | None], digits: int) -> str:
    mean, sd = value["mean"], value["sd"]
    return f"{mean:.{digits}f}" + ("" if sd is None else f" ± {sd:.{digits}f}")


def picture(out: Path, into: Path, network: str = "unet") -> None:
    """Samples of every method for the same captions and noise, style left and concept right."""

    def samples(method: str, shift: str) -> Path:
        return out / "samples" / f"{network}-{shift}-{method.replace(' ', '_')}-0.pt"

    blank = torch.ones(COLUMNS, 3, shapes.SIZE, shapes.SIZE)
    lines: dict[str, list[torch.Tensor]] = {"drawn": []}
    for shift, (style, kinds) in judging.SHIFTS.items():
        held = shapes.scenes(COLUMNS, judging.TEST, kinds)
        lines["drawn"].append(shapes.pictures(held, style, 77))
        for method, name in SHOWN.items():
            if not any(samples(method, s).exists() for s in judging.SHIFTS):
                continue
            file = samples(method, shift)
            known = torch.load(file, weights_only=True)[:COLUMNS] if file.exists() else blank
            lines.setdefault(name, []).append(known)
    cell = shapes.SIZE * SCALE + GAP
    sheet = Image.new("RGB", (MARGIN + (2 * COLUMNS) * cell + 4 * GAP, len(lines) * cell), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (name, both) in enumerate(lines.items()):
        pen.text((4, row * cell + cell // 2 - 8), name, fill="black", font_size=12)
        for column, image in enumerate(torch.cat(both)):
            pixels = ((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
            side = (shapes.SIZE * SCALE, shapes.SIZE * SCALE)
            left = MARGIN + column * cell + (4 * GAP if column >= COLUMNS else 0)
            sheet.paste(
                Image.fromarray(pixels).resize(side, Image.Resampling.NEAREST), (left, row * cell)
            )
    into.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(into, optimize=True)


def main() -> None:
    """Print and write what there is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/image-generation"))
    parser.add_argument("--picture", type=Path, default=Path("docs/image-generation.png"))
    args = parser.parse_args()
    rows = read(args.out)
    lines, compared = summary(rows), orders(rows)
    print(markdown(lines))
    for order in compared:
        print(order)
    facts = {
        "commands": [
            "python recipes/image_generation/run.py",
            "python recipes/image_generation/table.py",
        ],
        "hardware": "one core of a shared machine",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "denoisers": list(parts.NETWORKS),
        "summary": lines,
        "beside_lora": compared,
        "rows": rows,
    }
    Path(__file__).with_name("results.json").write_text(json.dumps(facts, indent=1) + "\n")
    picture(args.out, args.picture)


if __name__ == "__main__":
    main()
