"""Draw docs/beyond.md from what was measured beyond accuracy.

    python recipes/beyond.py

Robustness: the JSON in `recipes/shared_tasks/kept/robustness`; forgetting and ensembles:
`recipes/forgetting.json` and `recipes/ensembles.json`. What has not been run is not on the page.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from restuning._files import read_json
from restuning.bench.report import words
from restuning.bench.report.tables import Table
from restuning.bench.studies.robustness import tabulate_robustness

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "beyond.md"
KEPT = HERE / "shared_tasks" / "kept"
START = """# Beyond accuracy

Drawn by `python recipes/beyond.py` from committed JSON; how each is run stands in
[docs/bench.md](bench.md#beyond-accuracy).
"""


OLDER = (
    "These runs are at 112 px, smaller than the backbone's own size ([which costs](images.md#size) methods that "
    "leave the backbone as it is), and of `ridge` before it read all taps, weighed them and had a discriminant "
    "([how](mixing.md))."
)


def robustness() -> str:
    """Accuracy under corruptions and attacks, over all tasks and on each."""
    return f"{tabulate_robustness(KEPT).markdown()}\n{OLDER}\n\n{under_attack().markdown()}"


def under_attack() -> Table:
    """Clean accuracy, and what is left of it, by task."""
    results = [read_json(file) for file in sorted((KEPT / "robustness").rglob("*.json"))]
    tasks = list(dict.fromkeys(r["task"] for r in results))
    rows = []
    for label in dict.fromkeys(r["label"] for r in results):
        cells = []
        for task in tasks:
            own = [r for r in results if (r["task"], r["label"]) == (task, label)]
            values = [
                statistics.mean(r["clean"] for r in own),
                statistics.mean(v for r in own for kind in r["corruptions"].values() for v in kind),
                statistics.mean(r["pgd"][0] for r in own),
            ]
            cells.append(" / ".join(words.format_percent(value) for value in values))
        rows.append([label, *cells])
    covers = f"Clean / corrupted / under PGD of {results[0]['radii'][0]:g}/255, in %."
    return Table("Robustness by task", covers, ["method", *tasks], rows)


def forgetting(file: Path) -> str:
    """What is left of five tasks that were learned one after the other."""
    found = read_json(file)
    rows = [
        [
            row["row"],
            words.format_percent(statistics.mean(row["accuracy"][-1])),
            f"{100 * row['forgetting']:.2f}",
            words.format_count(row["answers_changed"]),
        ]
        for row in found["rows"]
    ]
    epochs = found["rows"][0]["settings"]["epochs"]
    covers = (
        f"Five tasks of two digits each, learned in order, {epochs} epochs each, one seed; "
        f"backbone {found['backbone']}. Forgotten: points from when each task was learned to the end; "
        f"answers: of earlier tasks' test images, that are no longer what they were. `{found['command']}`."
    )
    columns = ["", "accuracy at the end", "forgotten", "answers changed"]
    return Table("Forgetting", covers, columns, rows).markdown()


def ensembles(file: Path) -> str:
    """Several that answer together against one of the same size."""
    found = read_json(file)
    rows = [
        [
            row["row"],
            words.format_percent(row["mean"], statistics.stdev(row["accuracy"]))
            if len(row["accuracy"]) > 1
            else words.format_percent(row["mean"]),
            words.format_count(row["parameters"]),
            words.format_percent(row["disagreement"]) if row["disagreement"] else "",
        ]
        for row in found["rows"]
    ]
    covers = (
        f"Test accuracy in %, {found['data']}, {found['settings']['epochs']} epochs, three seeds (an ensemble "
        f"of three seeds is one); parameters with heads; members disagree on so many test images in %. "
        f"`{found['command']}`."
    )
    columns = ["", "accuracy", "parameters", "members disagree"]
    return Table("Ensembles", covers, columns, rows).markdown()


def page() -> str:
    """The whole page."""
    parts = [START]
    if any((KEPT / "robustness").rglob("*.json")):
        parts.append(robustness())
    for draw, name in ((forgetting, "forgetting.json"), (ensembles, "ensembles.json")):
        if (HERE / name).exists():
            parts.append(draw(HERE / name))
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
