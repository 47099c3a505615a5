"""Write `docs/benchmarks.md` and its plots from the committed results.

    python benchmarks/page.py

Nothing is measured here: every number on the page stands in a JSON of `benchmarks/results/`, and
beside it the command that made it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from common import HERE, RESULTS

DOCS = HERE.parent / "docs"
PLOTS = DOCS / "benchmarks"
OURS, OTHERS = "#1f6f8b", "#b9c2c9"
ORDER = (
    "gpu",
    "step",
    "lora",
    "overhead",
    "whole-run",
    "store",
    "beyond-memory",
    "content-identity",
    "verified-store",
    "many-tasks",
    "sweep",
    "growth",
    "extract",
    "decode",
    "serve",
    "soak",
    "export",
)
ELSEWHERE = ("forecast", "grid", "billions", "engines", "diffusion")
"""Results that `docs/planning.md`, `docs/engines.md` and `docs/diffusion.md` are about."""


MOST_SHOWN = 30
"""Lines of a section that stand open."""


def number(value: Any) -> str:
    """A value as it is printed; a spread as its median with smallest and largest."""
    if isinstance(value, Mapping) and "median" in value:
        return f"{number(value['median'])} ({number(value['min'])} to {number(value['max'])})"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "" if value is None else str(value).replace("|", "/")


def table(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Rows as a Markdown table over all their keys, nested mappings one level down."""
    flat = []
    for row in rows:
        line: dict[str, str] = {}
        for key, value in row.items():
            if key.endswith("_bytes") or key.startswith("peak_bytes"):
                name = key.replace("_bytes", "").replace("bytes_", "")
                line[f"{name}, MiB".replace("_", " ")] = number(value / 2**20)
            elif isinstance(value, Mapping) and "median" not in value:
                line |= {f"{key}: {k}".replace("_", " "): number(v) for k, v in value.items()}
            elif not isinstance(value, list):
                line[key.replace("_", " ")] = number(value)
        flat.append(line)
    columns = list(dict.fromkeys(k for line in flat for k in line))
    return [
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
        *(f"| {' | '.join(line.get(c, '') for c in columns)} |" for line in flat),
    ]


def long(result: Mapping[str, Any]) -> list[str]:
    """Rows with many nested values as lines: what and value."""
    lines = ["| row | value |", "|---|---|"]

    def walk(name: str, value: Any) -> None:
        if isinstance(value, Mapping) and "median" not in value:
            for key, inner in value.items():
                walk(f"{name}, {key}" if name else str(key), inner)
        elif isinstance(value, list):
            for inner in value:
                walk(name, inner)
        elif value is not None:
            lines.append(f"| {name.replace('_', ' ')} | {number(value)} |")

    walk("", result)
    return lines


def bars(
    file: str,
    title: str,
    unit: str,
    values: Mapping[str, float],
    ours: Callable[[str], bool],
    log: bool = False,
) -> str:
    """A plot of horizontal bars, ours in colour; returns its Markdown."""
    import matplotlib.pyplot as plt

    names = list(values)[::-1]
    figure, axes = plt.subplots(figsize=(7, 0.45 * len(names) + 1.1), dpi=110)
    colours = [OURS if ours(name) else OTHERS for name in names]
    drawn = axes.barh(names, [values[n] for n in names], color=colours)
    axes.bar_label(drawn, [f" {number(float(values[n]))}" for n in names], fontsize=8)
    if log:
        axes.set_xscale("log")
    axes.set(xlabel=unit)
    # Over the whole picture: names of rows take the left third of it.
    figure.suptitle(title, x=0.02, ha="left")
    axes.margins(x=0.16)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    PLOTS.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOTS / file, metadata={"Software": ""})
    plt.close(figure)
    return f"![{title}](benchmarks/{file})"


def plots(stem: str, result: Mapping[str, Any]) -> list[str]:
    """Pictures of one result."""
    rows = result.get("rows", [])
    if stem.startswith("step"):
        memory = {r["mode"]: r["peak_bytes_above_weights"] / 2**20 for r in rows}
        return [
            bars(
                f"{stem}-memory.png",
                "Peak memory of a training step above the weights",
                "MiB",
                memory,
                lambda n: n.startswith("res-tuning"),
            )
        ]
    if stem.startswith("whole-run"):
        hours = {r["method"]: r["seconds"] / 3600 for r in rows if "seconds" in r}
        return [
            bars(
                f"{stem}.png",
                result["what"],
                "hours (log scale)",
                hours,
                lambda n: n.startswith("cached"),
                log=True,
            )
        ]
    if stem.startswith("many-tasks") and "over_backbone" in rows[0]:
        pictures = []
        for row in rows:
            over = {n: v["median"] for n, v in row["over_backbone"].items()}
            over |= {n: v for n, v in row["extrapolated_over_backbone"].items() if v}
            pictures.append(
                bars(
                    f"{stem}-{row['model']}.png",
                    f"{row['model']}: time over one forward",
                    "backbone forwards",
                    over,
                    lambda n: n.endswith(" tasks"),
                )
            )
        return pictures
    if stem.startswith("sweep"):
        ratios = {f"all arms over one, from {r['from']}": r["all_over_one"] for r in rows}
        return [bars(f"{stem}.png", result["what"], "times one arm", ratios, lambda n: True)]
    return []


NO_GPU = (
    "All of it was measured on a CPU: no GPU was at hand. `python benchmarks/gpu.py` measures steps, whole "
    "runs, many tasks, a sweep, engines, a ViT of a billion parameters, Stable Diffusion v1.5 and the rivals "
    "on one in less than eight minutes, goes on where it was ended, and leaves `gpu-cuda.json` among the "
    "results, which this page shows then. That it runs is tested at small shapes "
    "on a CPU (`--tiny`); what it will find on a GPU nobody knows yet."
)


def groups(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Rows of `gpu.py` by what they are of: a table where they are alike, lines where they are not."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["row"].partition("/")[0], []).append(row)
    lines = []
    for name, members in found.items():
        lines += [f"### {name}", ""]
        alike = [row for row in members if "step_seconds" in row]
        if alike:
            hidden = ("mode", "method", "architecture")
            lines += table({k: v for k, v in row.items() if k not in hidden} for row in alike)
        for row in members:
            if row not in alike:
                told = {k: v for k, v in row.items() if k not in ("row", "targets")}
                lines += ["", f"{row['row']}:", "", *long(told)]
        lines.append("")
    return lines


def section(stem: str, result: Mapping[str, Any]) -> list[str]:
    """One benchmark."""
    machine = result.get("machine", {})
    where = machine if isinstance(machine, str) else machine.get("gpu") or machine.get("cpu", "")
    versions = ", ".join(f"{k} {v}" for k, v in result.get("versions", {}).items())
    lines = [
        f"## {stem}",
        "",
        f"{result['what']}.",
        "",
        "```",
        result["command"],
        "```",
        "",
        f"{where}, {result.get('threads', '?')} threads; {versions}; {result.get('measured_on', '')}",
        "",
    ]
    targets = result.get("targets", [])
    if targets:
        lines += ["| claim | wanted | measured | |", "|---|---|---|---|"]
        told = {True: "held", False: "**missed**", None: "not measured"}
        lines += [
            f"| {t['what']} | {t['sense']} {number(t['limit'])} | {number(t['measured'])} "
            f"| {told[t['held']]} |"
            for t in targets
        ]
        lines.append("")
    for picture in plots(stem, result):
        lines += [picture, ""]
    nested = stem.startswith(("many-tasks", "store"))
    rest = {
        k: v
        for k, v in result.items()
        if k
        not in (
            "what",
            "command",
            "device",
            "threads",
            "machine",
            "versions",
            "targets",
            "measured_on",
        )
    }
    if stem.startswith("gpu"):
        lines += groups(rest["rows"])
        if rest["missing"]:
            lines += [f"Still to be measured: {', '.join(rest['missing'])}.", ""]
    elif nested:
        lines += ["<details><summary>all values</summary>", "", *long(rest), "", "</details>", ""]
    elif isinstance(rest.get("rows"), list):
        lines += [*table(rest["rows"]), ""]
    else:
        # By name: servers, formats, stages of a pass.
        rest.pop("notes", None)
        values = long(rest)
        if len(values) > MOST_SHOWN:
            values = ["<details><summary>all values</summary>", "", *values, "", "</details>"]
        lines += [*values, ""]
    for name, reason in (result.get("not_measured") or {}).items():
        lines.append(f"- {name}: not measured ({reason})")
    if result.get("notes"):
        lines += ["", *result["notes"], ""]
    return lines


def main() -> None:
    """Write the page."""
    found = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in RESULTS.glob("*.json")}
    found = {stem: result for stem, result in found.items() if not stem.startswith(ELSEWHERE)}

    def place(stem: str) -> tuple[int, str]:
        first = next((i for i, name in enumerate(ORDER) if stem.startswith(name)), len(ORDER))
        return first, stem

    lines = [
        "# Benchmarks",
        "",
        (
            "Written by `python benchmarks/page.py` from the JSON in `benchmarks/results/`; every "
            "section begins with the command that measured it. Ratios are taken within one run. "
            "A spread is printed as median (smallest to largest)."
        ),
        "",
    ]
    if not any(stem.startswith("gpu") for stem in found):
        lines += [NO_GPU, ""]
    for stem in sorted(found, key=place):
        lines += section(stem, found[stem])
    lines += ["", "Forecasts beside what was measured stand in [planning](planning.md)."]
    notes = Path(HERE / "notes.md")
    if notes.exists():
        lines += ["", notes.read_text(encoding="utf-8").rstrip()]
    text = "\n".join(lines).rstrip() + "\n"
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    (DOCS / "benchmarks.md").write_text(text, encoding="utf-8")
    print(f"{len(found)} results on {DOCS / 'benchmarks.md'}")


if __name__ == "__main__":
    main()
