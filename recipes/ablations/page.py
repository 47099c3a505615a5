"""Draw docs/ablations.md from the JSON of the ablations that were run.

    python recipes/ablations/page.py

Each folder beside this file is a grid of `restuning bench run digits --ablation NAME`; what has not
been run is not on the page.
"""

from __future__ import annotations

from pathlib import Path

from restuning.bench.report import read_published, summarise, words
from restuning.bench.report.summary import read_parameters
from restuning.bench.report.tables import Table
from restuning.bench.studies.ablations import ABLATIONS

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "ablations.md"
START = """# Ablations

One command each (`docs/bench.md`); drawn by `python recipes/ablations/page.py` from the JSON in
`recipes/ablations`. Small backbone, small images: what holds here is a hint for large ones, and each table
says what it covers. Published tables are on another backbone and data set.
"""


def table(name: str) -> Table | None:
    """Accuracy and parameters of an ablation's entries; None where none has been run."""
    folder = HERE / name
    if not any((folder / "runs").rglob("final*.json")):
        return None
    summary = summarise(folder)
    tasks, asked = summary.tasks, [e.partition("=")[0] for e in ABLATIONS[name].entries]
    labels = [n for n in summary.labels if all((t, n) in summary.cells for t in tasks)]
    order = sorted(
        labels, key=lambda n: next((k for k, a in enumerate(asked) if n == a), len(asked))
    )
    rows = [
        [
            label,
            words.format_percent(*summary.mean(label, tasks)),
            words.format_count(summary.cost(label, tasks, read_parameters)),
        ]
        for label in order
    ]
    missing = (
        f" Not run: {len(asked) - len(labels)} of {len(asked)}." if len(labels) < len(asked) else ""
    )
    covers = f"Test accuracy in %, {', '.join(tasks)}. {summary.protocol()}.{missing}"
    return Table(
        f"{name}: {ABLATIONS[name].question}",
        covers,
        ["", "accuracy", "parameters without head"],
        rows,
    )


def page() -> str:
    """The whole page."""
    parts = [START]
    for name, ablation in ABLATIONS.items():
        made = table(name)
        if made is not None:
            parts.append(made.markdown())
            if ablation.published:
                parts.append(read_published(ablation.published).markdown())
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
