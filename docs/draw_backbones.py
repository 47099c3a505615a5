"""Writes `docs/backbones.md` from the zoo's result: `python docs/draw_backbones.py`."""

from __future__ import annotations

import json
import runpy
from collections import Counter
from pathlib import Path
from statistics import mean, stdev
from typing import Any

HERE = Path(__file__).parent
RESULT = HERE.parent / "benchmarks" / "results" / "zoo.jsonl"
CNN = HERE.parent / "recipes" / "cnn.json"
SIZES = runpy.run_path(str(HERE.parent / "tests" / "zoo" / "sizes.py"))

_DEEP = (
    "a bypass over 112 blocks: at lambda 0.5 the first ones count 2^-111, maps between widths shrink "
    "them further, and their gradient is below the least fp32 number; in fp64 it is there, and "
    "Res-Tuning inside passes"
)
_CHAOS = (
    "tuners of drawn weights in every block make the streams grow by four orders of magnitude, and "
    "rounding with them; with tuners at their start one input and a batch agree"
)
_CUBIC = (
    "lambda layers are cubic in what they read: with tuners of drawn weights in every block the streams "
    "reach 1e28, and then overflow"
)

TEXT = """# Backbones

Every backbone below went through one chain (`tests/zoo/chain.py`), with random weights and at a
small image size where it takes one: find the sites and prove them by one forward; attach Res-Tuning
inside; one training step that gives gradients to the task alone, and to all of it; the same for the
bypass, whose taps carry no graph; one input alone answers as it does in a batch; the backbone's
output and state, batch-norm statistics included, are equal bit for bit; save, load, the same
logits; release, no hook left.

{summary}

`python tests/zoo/run.py` repeats all of it and goes on where it was killed (`{versions}`; the run
below took {minutes:.0f} minutes on a shared CPU core, tracing included), `pytest -m longer
tests/zoo/test_chain.py` does so under pytest, and CI runs a sample. This page is drawn from `benchmarks/results/zoo.jsonl` by
`python docs/draw_backbones.py`.

*sites* counts operations over all layers of the smallest member; a layer without attention and MLP
(a convolutional block, or a stage where a network has no sums) is tuned beside its block. *proof*:
share of the family's sites whose sum, or for a block whose reader, was seen. *inline*, *bypass*:
members that pass. *reads*: what the bypass keeps of each tap: the class token, one pooled vector,
or all tokens. *one graph*: whether `torch.compile(fullgraph=True)` traces the smallest member with
both tasks.

## Maps and hierarchies

Streams that are maps (`b c h w` or `b h w c`) or change their width on the way are found like any
other. The layout belongs to the site and is proved by modules whose axes are known; tuners and taps
always have channels last, and tuners that mix no tokens see a grid as tokens. A block that changes
the width or the grid has no input of its output's shape: a tuner there reads its output.

The feature is the vector that the backbone itself returns (readout "own"), with whatever it does
after its last block, so give a headless one. **The bypass on them is a form of its own**: x_0 ...
x_(L-1) are the streams' means over their grid, x_L is that feature, and a learned linear map (over
64 channels where that is smaller) takes the state from one width to the next. Keeping one mean
instead of all tokens would be *exact* only for affine tuners, since mean(h(x)) = h(mean(x)) needs
that; with Res-Adapters it is another function of the backbone, chosen because every tap then costs
one vector, linear probing stays within it (lambda_L = 1, tuners no change), and a store holds a
few kilobytes an image. A plain ViT with a mean readout keeps all tokens, as in the paper. Tuners
that mix tokens (`ConvAdapter`) run inside the backbone, or in a bypass with `pool="mean"`, which
resamples the grid by average pooling.

## By family

| family | architectures | inline | bypass | layers | sites of the smallest | proof | reads | one graph | parameters (smallest) |
|---|---:|---:|---:|---|---|---:|---|---|---:|
{table}

## Not passing

{broken}

## On a real CNN

{cnn}
"""

WHY = {
    "hrnet_w18": _DEEP,
    "hrnet_w18_ssld": _DEEP,
    "tf_efficientnet_b3": _CHAOS,
    "lambda_resnet50ts": _CUBIC,
}
"""What was found behind the words of a failure."""


def latest() -> list[dict[str, Any]]:
    """The last line of every name, in the order of the file."""
    rows = map(json.loads, RESULT.read_text(encoding="utf-8").splitlines())
    return list({row["name"]: row for row in rows}.values())


def page(rows: list[dict[str, Any]], versions: str) -> str:
    """The whole page."""
    families: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda r: (_library(r) != "timm", r["family"], r["name"])):
        families.setdefault(_family(row), []).append(row)
    broken = [r for r in rows if not r["ok"]]
    summary = " ".join(
        f"**{library}: {sum(r['ok'] for r in mine)} of {len(mine)} pass the whole chain "
        f"({100 * sum(r['ok'] for r in mine) / len(mine):.1f} %).**"
        for library in ("timm", "transformers", "torchvision")
        if (mine := [r for r in rows if _library(r) == library])
    )
    return TEXT.format(
        summary=f"{summary} Of timm {len(SIZES['timm_names']())} architectures are meant: all up to "
        f"{SIZES['CAP'] / 1e6:.0f} million parameters, and the smallest of each family whose members "
        f"are all larger (up to {SIZES['LARGEST'] / 1e6:.0f} million).",
        versions=versions,
        minutes=sum(r["seconds"] for r in rows) / 60,
        table="\n".join(_line(name, members) for name, members in families.items()),
        broken="\n".join(
            f"- `{r['name']}`: {r['link']}: {r['reason'].replace('|', '/')}"
            + (f" ({why})" if (why := WHY.get(r["name"].partition(":")[2])) else "")
            for r in broken
        )
        or "None.",
        cnn=_on_cnn(),
    )


def _line(name: str, rows: list[dict[str, Any]]) -> str:
    smallest = min(rows, key=lambda r: r["parameters"] or 1e12)
    proofs = sum((Counter(r["proofs"]) for r in rows), Counter())
    total = sum(proofs.values())
    layers = [r["sites"].get("block", 0) for r in rows if r["sites"]]
    after = ("inline", "bypass")
    reached = {
        form: sum(
            r["ok"] or (bool(r[form]) and not r["link"].startswith(after[: i + 1])) for r in rows
        )
        for i, form in enumerate(after)
    }
    cells = [
        name,
        str(len(rows)),
        str(reached["inline"]),
        str(reached["bypass"]),
        "-"
        if not layers
        else f"{min(layers)} to {max(layers)}"
        if len(set(layers)) > 1
        else str(layers[0]),
        ", ".join(f"{n} {op}" for op, n in smallest["sites"].items()) or "none",
        f"{100 * proofs['residual'] / total:.0f} %" if total else "-",
        ", ".join(sorted({_READS[r["tokens"]] for r in rows if r["tokens"]})) or "-",
        {True: "yes", False: "no", None: "not tried"}[
            next((r["compiles"] for r in rows if r["compiles"] is not None), None)
        ],
        f"{smallest['parameters'] / 1e6:.1f} M",
    ]
    return f"| {' | '.join(cells)} |"


def _on_cnn() -> str:
    """What `recipes/cnn.py` measured."""
    if not CNN.exists():
        return "`python recipes/cnn.py` writes its table here; it has not been run."
    found = json.loads(CNN.read_text(encoding="utf-8"))
    methods = list(found["grids"])
    by: dict[tuple[str, str], list[float]] = {}
    for row in found["rows"]:
        by.setdefault((row["task"], row["method"]), []).append(100 * row["test_accuracy"])
    tasks = list(dict.fromkeys(row["task"] for row in found["rows"]))
    lines = [f"| task | {' | '.join(methods)} |", "|---|" + "---:|" * len(methods)]
    for task in tasks:
        cells = [f"{mean(by[task, m]):.1f} ± {stdev(by[task, m]):.1f}" for m in methods]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    seeds = [[mean(each) for each in zip(*(by[t, m] for t in tasks), strict=True)] for m in methods]
    cells = [f"{mean(s):.1f} ± {stdev(s):.1f}" for s in seeds]
    lines.append(f"| mean | {' | '.join(cells)} |")
    return (
        f"MobileNetV2 at width 0.35 with ImageNet weights at 112 px, 1000 training images a task, {found['seeds']} "
        "seeds, test accuracy in per cent of the last checkpoint; four settings a method, chosen on "
        "validation (`python recipes/cnn.py`, full figures in `recipes/cnn.json`). The size is smaller than "
        "the backbone's own 224 px; the figures are being redrawn at it.\n\n" + "\n".join(lines)
    )


_READS = {"cls": "class token", "last": "last token", "pool": "pooled", "all": "all tokens"}


def _library(row: dict[str, Any]) -> str:
    return row["name"].partition(":")[0]


def _family(row: dict[str, Any]) -> str:
    library, _, name = row["name"].partition(":")
    return f"timm {row['family']}" if library == "timm" else f"{library} {name}"


if __name__ == "__main__":
    import timm
    import torch
    import torchvision
    import transformers

    libraries = (torch, timm, transformers, torchvision)
    found = ", ".join(f"{m.__name__} {m.__version__.partition('+')[0]}" for m in libraries)
    (HERE / "backbones.md").write_text(page(latest(), found), encoding="utf-8")
