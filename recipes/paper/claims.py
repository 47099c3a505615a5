"""Write the tables of docs/paper.md: the paper's claims, ours beside what is published.

    python recipes/paper/claims.py

Ours come from the committed results of the recipes and benchmarks, the published figures from the package's
own tables and from `published.json` beside this file. A verdict says whether the direction of a claim
holds in our figures; these are of other backbones and data unless a table says otherwise.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from restuning._files import read_json
from restuning.bench.report import Summary, published_tables, summarise, words

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
PAGE = ROOT / "docs" / "paper.md"
PUBLISHED = Path(__file__).parent / "published.json"

HELD, PART, MISSED, ABSENT = "held", "held in part", "MISSED", "not shown"
LINEAR, BYPASS, DUAL = "linear", "res-tuning-bypass", "res-tuning"
SMALLER = "res-tuning:rank=6"
"""Res-Tuning with fewer parameters than LoRA."""

Lines = list[list[str]]


# What is read


def published(table: str, row: str, column: str = "accuracy") -> float:
    """A figure as printed."""
    found = {**published_tables(), **read_json(PUBLISHED)}[table]
    return found["rows"][row][found["columns"].index(column)]


def result(name: str) -> dict[str, Any]:
    """A committed result of a recipe, by its path below `recipes`."""
    return read_json(RECIPES / f"{name}.json")


def benchmark(name: str) -> dict[str, Any]:
    """A committed result of a benchmark."""
    return read_json(ROOT / "benchmarks" / "results" / f"{name}.json")


def grid(name: str) -> Summary:
    """A committed grid of `restuning bench run`, by its path below `recipes`."""
    return summarise(RECIPES / name)


def accuracy(rows: Sequence[dict[str, Any]], **wanted: Any) -> float:
    """Mean over tasks of the mean test accuracy over seeds, of the rows that have these values."""
    own = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    tasks = dict.fromkeys(row["task"] for row in own)
    return statistics.mean(
        statistics.mean(row["test_accuracy"] for row in own if row["task"] == task)
        for task in tasks
    )


# How it is written


def percent(value: float) -> str:
    """A share."""
    return words.format_percent(value)


def points(value: float) -> str:
    """A difference of shares, with its sign."""
    return f"{100 * value:+.1f}"


def printed(value: float) -> str:
    """A published figure."""
    return f"{value:g}"


def ratio(value: float) -> str:
    """One amount over another."""
    return f"{value:.3f}"


def judge(held: bool) -> str:
    """The verdict on one comparison."""
    return HELD if held else MISSED


def judge_all(verdicts: Sequence[str]) -> str:
    """The verdict on several comparisons, with their count where it is in part."""
    right = sum(each == HELD for each in verdicts)
    if right in (0, len(verdicts)):
        return HELD if right else MISSED
    return f"{PART}: {right} of {len(verdicts)}, {MISSED} {len(verdicts) - right}"


# The sections, in the order of the page


def unbound() -> Lines:
    """Table 1: each method in its own form and unbound, trained alike."""
    digits, cifar = grid("ablations/original-unbound"), result("paper/results/prefix_unbound")
    rows = []
    for name, bound, unbound_row in (
        ("prefix", "prefix", "Res-Prefix (mha)"),
        ("prompt", "vpt-deep", "Res-Prompt (mha)"),
        ("adapter", "adapter", "Res-Adapter (ffn)"),
    ):
        pair = [digits.cells["digits", n].mean for n in (bound, f"{name} unbound")]
        seeds = len(digits.cells["digits", bound].runs)
        theirs = printed(published("original-unbound", unbound_row))
        rows.append(_pair(f"{name}, digits ({seeds} seeds)", pair, theirs))
    pair = [accuracy(cifar["rows"], method=n) for n in ("prefix", "res-tuning[mha=prefix]")]
    seeds = len({row["seed"] for row in cifar["rows"]})
    theirs = printed(published("original-unbound", "Res-Prefix (mha)"))
    return [*rows, _pair(f"prefix, cifar100 ({seeds} seeds)", pair, theirs)]


def _pair(name: str, pair: Sequence[float], theirs: str) -> list[str]:
    bound, free = pair
    return [name, percent(bound), percent(free), points(free - bound), theirs, judge(free >= bound)]


def combination_cells() -> dict[str, tuple[float, float]]:
    """By combination of tuners: ours and the published figure."""
    ours = grid("ablations/combinations")
    rows = {}
    for name in published_tables()["combinations"]["rows"]:
        label = f"res-tuning[{name.replace(', ', ',')}]"
        rows[name] = (ours.cells["digits", label].mean, published("combinations", name))
    return rows


def combinations() -> Lines:
    """Table 2: the 21 combinations."""
    return [[name, percent(o), printed(p)] for name, (o, p) in combination_cells().items()]


def orders() -> Lines:
    """What Table 2 says as a whole: more tuners, more accuracy."""
    cells = combination_cells()
    by_count = {
        n: [cell for name, cell in cells.items() if name.count("=") == n] for n in (1, 2, 3)
    }
    best = {n: [max(cell[k] for cell in own) for k in (0, 1)] for n, own in by_count.items()}
    mean = {n: [statistics.mean(c[k] for c in own) for k in (0, 1)] for n, own in by_count.items()}
    return [
        _order(f"{what} of {many}, above {what} of {few}", of[more], of[less])
        for what, of in (("best", best), ("mean", mean))
        for more, less, many, few in ((2, 1, "dual", "single"), (3, 2, "tri", "dual"))
    ]


def _order(name: str, more: Sequence[float], less: Sequence[float]) -> list[str]:
    return [
        name,
        f"{percent(more[0])}, {percent(less[0])}",
        f"{more[1]:.2f}, {less[1]:.2f}",
        judge(more[0] > less[0]),
    ]


OTHERS = {
    "linear": ("vtab-1k", "Linear"),
    "lora": ("vtab-1k", "LoRA"),
    "adapter": ("vtab-1k", "Adapter"),
    "vpt-deep": ("vtab-1k", "VPT-Deep"),
    "ssf": ("vtab-1k", "SSF"),
    "adaptformer": ("cifar100", "AdaptFormer"),
    "lst": ("vtab-1k", "LST†"),
    "prefix": None,
    "bitfit": None,
    "convpass": None,
    "ms-swift": None,
}
"""Methods that Res-Tuning is compared with, and the published rows of those that have one."""


def others() -> Lines:
    """Res-Tuning beside other methods: our mean over the tasks that both have, and the published one."""
    found = grid("shared_tasks/epochs_10")
    rows = []
    for own, label in [*((DUAL, label) for label in OTHERS), (SMALLER, "lora")]:
        row = OTHERS[label]
        tasks = [t for t in found.tasks if all((t, n) in found.cells for n in (label, own))]
        if not tasks:
            continue
        theirs = "-"
        if row is not None:
            column = "mean of tasks" if row[0] == "vtab-1k" else "accuracy"
            pair = [published(row[0], n, column) for n in ("Res-Tuning", row[1])]
            theirs = f"{printed(pair[0])}, {printed(pair[1])}"
        ours = [statistics.mean(found.cells[t, n].mean for t in tasks) for n in (own, label)]
        seeds = sorted({len(found.cells[t, n].runs) for t in tasks for n in (own, label)})
        shown = f"{percent(ours[0])}, {percent(ours[1])}"
        rows.append(
            [
                label if own == DUAL else f"{label}, Res-Tuning {own.partition(':')[2]}",
                str(len(tasks)),
                "-".join(map(str, dict.fromkeys((seeds[0], seeds[-1])))),
                shown,
                points(ours[0] - ours[1]),
                theirs,
                judge(ours[0] >= ours[1]),
            ]
        )
    return rows


STEPS = {
    "Full": "full",
    "Linear": "linear",
    "LoRA": "lora",
    "Res-Tuning": "res-tuning",
    "RT-Bypass": "res-tuning-bypass",
}
"""By row of the published table: the mode of `benchmarks/step.py`."""


def memory_over_full() -> dict[str, tuple[float, float, float]]:
    """By row: ours over full tuning's above the weights, the same with the weights, and published."""
    rows = {row["mode"]: row for row in benchmark("step-cpu")["rows"]}
    weights = 4 * rows["full"]["trained_parameters"]
    above = {name: rows[mode]["peak_bytes_above_weights"] for name, mode in STEPS.items()}
    theirs = {name: published("vtab-1k", name, "memory GB") for name in STEPS}
    return {
        name: (
            above[name] / above["Full"],
            (above[name] + weights) / (above["Full"] + weights),
            theirs[name] / theirs["Full"],
        )
        for name in STEPS
    }


def memory() -> Lines:
    """Memory of a training step."""
    rows = {row["mode"]: row for row in benchmark("step-cpu")["rows"]}
    return [
        [
            name,
            words.format_size(rows[STEPS[name]]["peak_bytes_above_weights"]),
            ratio(above),
            ratio(whole),
            f"{printed(published('vtab-1k', name, 'memory GB'))} GB",
            ratio(theirs),
        ]
        for name, (above, whole, theirs) in memory_over_full().items()
    ]


def beside_linear() -> list[tuple[str, str, float, float]]:
    """Where it was measured, task, linear probing, bypass: the mean over seeds."""
    found: list[tuple[str, str, float, float]] = []

    def add(name: str, rows: Sequence[dict[str, Any]], key: str, linear: str, side: str) -> None:
        for task in dict.fromkeys(row["task"] for row in rows):
            pair = [accuracy(rows, task=task, **{key: label}) for label in (linear, side)]
            found.append((name, task, *pair))

    add("ViT-Ti", result("bypass_start")["rows"], "row", "linear", "bypass")
    add("MobileNet", result("cnn")["rows"], "method", LINEAR, BYPASS)
    add("MiniLM, texts", result("text")["rows"], "method", LINEAR, BYPASS)
    digits = {row["name"]: row["mean"] for row in result("digits")["rows"]}
    found.append(("embedded", "digits", digits[LINEAR], digits[BYPASS]))
    add(
        "ViT-Ti, smaller images, old start",
        result("paper/results/bypass")["rows"],
        "method",
        LINEAR,
        BYPASS,
    )
    return found


def linear_lines() -> Lines:
    """The bypass beside linear probing."""
    return [
        [where, task, percent(a), percent(b), points(b - a), judge(b > a)]
        for where, task, a, b in beside_linear()
    ]


def detached() -> Lines:
    """The bypass beside other methods that send no gradient through the backbone, at equal epochs."""
    found = grid("shared_tasks/epochs_10")
    rows = []
    for label, row in (("lst", "LST"), ("ms-swift", None), ("mixing-bypass", None)):
        tasks = [t for t in found.tasks if all((t, n) in found.cells for n in (label, BYPASS))]
        ours = [statistics.mean(found.cells[t, n].mean for t in tasks) for n in (BYPASS, label)]
        sizes = [
            words.format_size(found.cost(n, tasks, lambda run: run["memory"]["live_step_bytes"]))
            for n in (BYPASS, label)
        ]
        theirs = "-"
        if row is not None:
            pair = [published("cifar100", n) for n in ("Res-Tuning-Bypass", row)]
            theirs = f"{printed(pair[0])}, {printed(pair[1])}"
        rows.append(
            [
                label,
                ", ".join(f"{t} ({len(found.cells[t, label].runs)})" for t in tasks),
                f"{percent(ours[0])}, {percent(ours[1])}",
                ", ".join(sizes),
                theirs,
                judge(ours[0] >= ours[1]),
            ]
        )
    return rows


PARTS = ("linear probing", "horizontal", "vertical", "both")


def parts_cells() -> dict[str, list[float]]:
    """By place: linear probing, the bypass with horizontal tuners, with vertical ones, with both."""
    digits, start = grid("ablations/bypass"), result("bypass_start")["rows"]
    small = result("paper/results/bypass")["rows"]
    methods = (LINEAR, "bypass-horizontal", "bypass-vertical", BYPASS)
    rows = (LINEAR, "bypass-horizontal", "bypass-vertical", "bypass")
    tasks = [len({row["task"] for row in each}) for each in (start, small)]
    return {
        f"ViT-Ti, {tasks[0]} tasks": [accuracy(start, row=name) for name in rows],
        f"ViT-Ti, {tasks[1]} tasks, smaller images, old start": [
            accuracy(small, method=name) for name in methods
        ],
        "embedded, digits, old start": [digits.cells["digits", name].mean for name in methods],
    }


def parts() -> Lines:
    """Table 3b: horizontal and vertical tuners, ours beside the published figures."""
    lines = [
        ["published, CIFAR-100", *(printed(published("bypass", name)) for name in PARTS), "", ""]
    ]
    for where, cells in parts_cells().items():
        _, across, below, both = cells
        lines.append(
            [where, *map(percent, cells), judge(both > max(across, below)), judge(across > below)]
        )
    return lines


def many_tasks() -> Lines:
    """Many tasks on the same inputs: time over that of one backbone forward a task."""
    lines = []
    for row in benchmark("many-tasks-cpu")["rows"]:
        for count in (19, 64):
            over = row["over_backbone"][f"{count} tasks"]["median"]
            alone = 1 + row["bank_alone_over_backbone"][f"bank of {count}"]
            lines.append(
                [
                    f"ours, {row['model']}, {count} tasks",
                    ratio(over),
                    ratio(alone),
                    percent(1 - over / count),
                ]
            )
    lines.append(
        ["published, ViT-B/16, 19 tasks", "-", "-", percent(1 - published_share("many-tasks-19"))]
    )
    return lines


def published_share(table: str) -> float:
    """Time of the bypass for all tasks over that of the backbone tuned for each."""
    last = read_json(PUBLISHED)[table]["columns"][-1]
    first = next(iter(read_json(PUBLISHED)[table]["rows"]))
    return published(table, "Res-Tuning-Bypass", last) / published(table, first, last)


DENOISERS = {
    "Full": "full",
    "LoRA": "lora",
    "Res-Tuning": "res-tuning",
    "Res-Tuning-Bypass": "bypass",
}


def denoiser_memory() -> Lines:
    """Stable Diffusion v1.5: what a step keeps for backward, counted, beside the published memory."""
    found = benchmark("diffusion-cpu")
    rows = {row["method"]: row for row in found["rows"] if row["architecture"] == "sd15"}
    lines = []
    for name, method in DENOISERS.items():
        hours = published("coco2017", name, "hours an epoch") / published(
            "coco2017", "Full", "hours an epoch"
        )
        gigabytes = published("coco2017", name, "memory GB")
        time = found["times"]["over_full"].get(method)
        lines.append(
            [
                name,
                words.format_size(rows[method]["saved_for_backward_bytes"]),
                ratio(rows[method]["saved_over_full"]),
                ratio(rows[method]["total_bytes"] / rows["full"]["total_bytes"]),
                f"{gigabytes:g} GB",
                ratio(gigabytes / published("coco2017", "Full", "memory GB")),
                "-" if time is None else ratio(time["median"]),
                ratio(hours),
            ]
        )
    return lines


DRAWN = {
    "Full": "full",
    "LoRA": "LoRA r8",
    "Res-Tuning": "res-tuning",
    "Res-Tuning-Bypass": "bypass",
}


def small_images() -> dict[str, dict[str, dict[str, Any]]]:
    """Of the small UNet, by shift and published row: error of noise and distance."""
    rows = result("image_generation/results")["summary"]
    return {
        shift: {
            name: next(
                r
                for r in rows
                if (r["network"], r["shift"], r["method"]) == ("unet", shift, method)
            )
            for name, method in DRAWN.items()
        }
        for shift in ("style", "concept")
    }


def images() -> Lines:
    """Small denoisers on drawn pictures, beside the published FID on COCO2017."""
    found = small_images()
    return [
        [
            name,
            str(found["style"][name]["seeds"]),
            *(
                f"{found[shift][name][key]['mean']:{form}}"
                for shift in found
                for key, form in (("epsilon_error", ".4f"), ("fd_judge", ".0f"))
            ),
            f"{published('coco2017', name, 'FID'):.2f}",
        ]
        for name in DRAWN
    ]


# The list of claims


def text_to_image_claim(better: str, than: str) -> tuple[str, str]:
    """Ours and the verdict on one method having the lower error of noise, on both shifts."""
    found = small_images()
    pairs = [
        [rows[name]["epsilon_error"]["mean"] for name in (better, than)] for rows in found.values()
    ]
    shown = "; ".join(
        f"{shift} {a:.4f}, {b:.4f}" for shift, (a, b) in zip(found, pairs, strict=True)
    )
    return f"stand-in, error of noise: {shown}", judge_all([judge(a < b) for a, b in pairs])


def texts() -> str:
    """Res-Tuning and LoRA on texts."""
    rows = result("text")["rows"]
    tasks = dict.fromkeys(row["task"] for row in rows)
    return "; ".join(
        f"{task}: Res-Tuning {percent(accuracy(rows, task=task, method=DUAL))}, "
        f"LoRA {percent(accuracy(rows, task=task, method='lora'))}"
        for task in tasks
    )


def forgetting() -> str:
    """How many answers to the first tasks the later ones have changed."""
    rows = result("forgetting")["rows"]
    return "answers changed by later tasks: " + ", ".join(
        f"{row['row']} {row['answers_changed']}" for row in rows
    )


def claims() -> Lines:
    """One a claim: what the paper says, ours, the verdict, and where it stands."""
    order = {line[0]: line for line in orders()}
    rows, steps = others(), memory_over_full()
    linear = beside_linear()
    parts_of = parts()[1:]
    fid = {name: published("coco2017", name, "FID") for name in DRAWN}
    many = benchmark("many-tasks-cpu")["rows"][-1]["over_backbone"]["19 tasks"]["median"]
    # The one of Res-Tuning that was run on all tasks and seeds, and has fewer parameters than LoRA.
    lora = rows.pop()
    above = sum(line[-1] == HELD for line in rows)
    wins = sum(b > a for _, _, a, b in linear)
    mean = [statistics.mean(line[k] for line in linear) for k in (2, 3)]
    both = published("bypass", "both")

    def pair(table: str, one: str, other: str, column: str = "accuracy") -> str:
        return ", ".join(printed(published(table, name, column)) for name in (one, other))

    def ranked(name: str) -> list[str]:
        return [order[name][2], order[name][1], order[name][3]]

    return [
        [
            "[Unbound prefix, prompt and adapter compute what the bound ones do](#unbound-forms)",
            "equations 5, 11 to 13",
            "-",
            "within rounding, by tests",
            HELD,
        ],
        [
            "[Trained, the unbound form is as accurate](#unbound-forms)",
            "Table 1",
            "the column of originals could not be read",
            ", ".join(f"{line[0].partition(' (')[0]} {line[3]}" for line in unbound()),
            judge_all([line[-1] for line in unbound()]),
        ],
        [
            "[Any tuner stands beside any operation](#combinations)",
            "Table 2",
            f"{len(combinations())} combinations",
            f"{len(combinations())} trained",
            HELD,
        ],
        [
            "[Two tuners are better than one (best)](#combinations)",
            "Table 2a, 2b",
            *ranked("best of dual, above best of single"),
        ],
        [
            "[Three are better than two (best)](#combinations)",
            "Table 2c",
            *ranked("best of tri, above best of dual"),
        ],
        [
            "[Res-Tuning is above LoRA](#res-tuning-beside-other-methods)",
            "VTAB-1K, mean of tasks",
            pair("vtab-1k", "Res-Tuning", "LoRA", "mean of tasks"),
            f"{lora[3]}, mean of {lora[1]} tasks",
            lora[-1],
        ],
        [
            "[Res-Tuning is above the other methods](#res-tuning-beside-other-methods)",
            "Table 3c, VTAB-1K",
            pair("vtab-1k", "Res-Tuning", "SSF", "mean of tasks") + " (SSF)",
            f"above {above} of {len(rows)}; below "
            + ", ".join(line[0] for line in rows if line[-1] == MISSED),
            judge_all([line[-1] for line in rows]),
        ],
        [
            "[Res-Tuning is above full fine-tuning](#res-tuning-beside-other-methods)",
            "Table 3c",
            pair("cifar100", "Res-Tuning", "Full"),
            "full fine-tuning was not run on these tasks",
            ABSENT,
        ],
        [
            "[Accuracy on FGVC](#res-tuning-beside-other-methods)",
            "FGVC",
            "Res-Tuning's rows could not be read",
            "no such data here",
            ABSENT,
        ],
        [
            "[Accuracy on texts](#res-tuning-beside-other-methods)",
            "texts",
            "the table could not be read",
            texts(),
            ABSENT,
        ],
        [
            "[No gradient enters the backbone](#the-bypass-memory)",
            "Figure 3c",
            "-",
            "exactly, by tests",
            HELD,
        ],
        [
            "[The bypass trains in about half of full tuning's memory](#the-bypass-memory)",
            "VTAB-1K, memory",
            f"{ratio(steps['RT-Bypass'][2])} of full",
            "{1:.3f} of full with the weights, {0:.3f} above them".format(*steps["RT-Bypass"]),
            judge(steps["RT-Bypass"][1] <= steps["RT-Bypass"][2]),
        ],
        [
            "[The bypass is above linear probing](#the-bypass-accuracy)",
            "Table 3b",
            pair("cifar100", "Res-Tuning-Bypass", "Linear"),
            f"mean {percent(mean[1])}, {percent(mean[0])}; above on {wins} of {len(linear)}; not on "
            + ", ".join(f"{task} ({where})" for where, task, a, b in linear if b <= a),
            judge_all([judge(b > a) for _, _, a, b in linear]),
        ],
        [
            "[The bypass is above the ladder (LST)](#the-bypass-accuracy)",
            "Table 3c",
            pair("cifar100", "Res-Tuning-Bypass", "LST"),
            detached()[0][2],
            detached()[0][-1],
        ],
        [
            "[The bypass is above full fine-tuning](#the-bypass-accuracy)",
            "Table 3b",
            pair("cifar100", "Res-Tuning-Bypass", "Full"),
            "full fine-tuning was not run on these tasks",
            ABSENT,
        ],
        [
            "[Horizontal and vertical tuners together are best](#horizontal-and-vertical-tuners)",
            "Table 3b",
            f"{printed(both)} both; {pair('bypass', 'horizontal', 'vertical')}",
            "; ".join(f"{line[0]}: {line[4]} both; {line[2]}, {line[3]}" for line in parts_of),
            judge_all([line[5] for line in parts_of]),
        ],
        [
            "[Horizontal ones alone are better than vertical ones](#horizontal-and-vertical-tuners)",
            "Table 3b",
            pair("bypass", "horizontal", "vertical"),
            "; ".join(f"{line[0]}: {line[2]}, {line[3]}" for line in parts_of),
            judge_all([line[6] for line in parts_of]),
        ],
        [
            "[One pass serves many tasks](#many-tasks-in-one-pass)",
            "figure of multi-task inference, 19 tasks",
            f"{percent(1 - published_share('many-tasks-19'))} % of the time saved",
            f"{percent(1 - many / 19)} % of the time saved, same inputs",
            judge(1 - many / 19 >= 1 - published_share("many-tasks-19")),
        ],
        [
            "[Tasks leave each other alone](#many-tasks-in-one-pass)",
            "Figure 3",
            "-",
            forgetting(),
            judge(not result("forgetting")["rows"][0]["answers_changed"]),
        ],
        [
            "[The same for image generation](#many-tasks-in-one-pass)",
            "figure of multi-task inference, 10 tasks",
            f"{percent(1 - published_share('many-tasks-10'))} % of the time saved",
            "not measured",
            ABSENT,
        ],
        [
            "[Text-to-image on COCO2017: FID](#text-to-image)",
            "table of text-to-image",
            f"Res-Tuning {fid['Res-Tuning']:.2f}, bypass {fid['Res-Tuning-Bypass']:.2f}",
            "no COCO, no weights of Stable Diffusion, no GPU here",
            ABSENT,
        ],
        *(
            [
                f"[{name} of a denoiser is above {than.replace('Full', 'full fine-tuning')}](#text-to-image)",
                "table of text-to-image",
                f"FID {fid[name]:.2f}, {fid[than]:.2f}",
                *text_to_image_claim(name, than),
            ]
            for name, than in (("Res-Tuning", "LoRA"), ("Res-Tuning", "Full"))
        ),
        [
            "[The bypass of a denoiser trains in less than a third of full tuning's memory](#text-to-image)",
            "table of text-to-image",
            denoiser_memory()[-1][5],
            "{2} of what is kept for backward, {3} with weights and moments, counted".format(
                *denoiser_memory()[-1]
            ),
            judge(float(denoiser_memory()[-1][3]) <= float(denoiser_memory()[-1][5])),
        ],
        [
            "[Fine-grained image generation](#text-to-image)",
            "figures",
            "pictures, no figures",
            "no such data and weights here",
            ABSENT,
        ],
        [
            "[Parameters of Res-Tuning and of the bypass](#parameters)",
            "Table 3c",
            pair("cifar100", "Res-Tuning", "Res-Tuning-Bypass", "params M") + " M",
            "to the last parameter, by tests",
            HELD,
        ],
    ]


TABLES: dict[str, tuple[list[str], Callable[[], Lines]]] = {
    "claims": (["claim", "where in the paper", "published", "ours", "verdict"], claims),
    "unbound": (
        ["", "bound", "unbound", "difference", "published, unbound, CIFAR-100", "not below"],
        unbound,
    ),
    "orders": (["", "ours, digits", "published, CIFAR-100", "verdict"], orders),
    "combinations": (["tuners", "ours, digits", "published, CIFAR-100"], combinations),
    "others": (
        [
            "Res-Tuning and",
            "tasks",
            "seeds",
            "ours",
            "difference",
            "published",
            "Res-Tuning not below",
        ],
        others,
    ),
    "memory": (
        [
            "",
            "ours, above the weights",
            "over full",
            "over full, with the weights",
            "published",
            "over full",
        ],
        memory,
    ),
    "linear": (["", "task", "linear", "bypass", "difference", "bypass above"], linear_lines),
    "detached": (
        [
            "bypass and",
            "tasks (seeds of the other)",
            "ours, accuracy",
            "ours, memory of a step",
            "published",
            "bypass not below",
        ],
        detached,
    ),
    "parts": (["", *PARTS, "both best", "horizontal above vertical"], parts),
    "many_tasks": (
        ["", "over one forward, in turns", "over one forward, parts added", "time saved, %"],
        many_tasks,
    ),
    "denoisers": (
        [
            "",
            "ours, kept for backward",
            "over full",
            "over full, with weights and moments",
            "published memory",
            "over full",
            "ours, time over full",
            "published, time over full",
        ],
        denoiser_memory,
    ),
    "images": (
        [
            "",
            "seeds",
            "style: error of noise",
            "style: FD_judge",
            "concept: error of noise",
            "concept: FD_judge",
            "published FID",
        ],
        images,
    ),
}
"""By mark on the page: the head, and what makes the lines."""


def drawn(text: str) -> str:
    """The page with its tables between their marks."""
    for mark, (head, lines) in TABLES.items():
        start, end = f"<!-- {mark} -->\n", f"<!-- end of {mark} -->\n"
        before, found, rest = text.partition(start)
        assert found, f"{PAGE.name} has no mark {mark}"
        table = "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *lines()))
        text = f"{before}{start}{table}\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    PAGE.write_text(drawn(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
