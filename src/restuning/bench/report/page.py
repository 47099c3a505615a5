"""The report as one HTML file that needs nothing else, and as Markdown with its plots beside it."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path

from restuning.bench.report import figures, words
from restuning.bench.report.statistics import paired_bootstrap
from restuning.bench.report.summary import (
    Summary,
    read_inference,
    read_memory,
    read_parameters,
    read_training_seconds,
    summarise,
)
from restuning.bench.report.tables import (
    Table,
    read_published,
    tabulate_accuracy,
    tabulate_choices,
    tabulate_costs,
)

STYLE = """
:root{--ink:#1c2430;--soft:#5b6675;--line:#e3e7ee;--card:#fff;--page:#f5f6f9;--mark:#2a6fbb}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1180px;margin:0 auto;padding:36px 20px 80px}
h1{font-size:30px;margin:0 0 4px;letter-spacing:-.02em}h2{font-size:20px;margin:44px 0 8px}
h3{font-size:15px;margin:0 0 6px}p{color:var(--soft);margin:4px 0 12px;max-width:80ch}
.lead{font-size:16px;color:var(--ink)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));gap:14px;margin:22px 0}
.tile,.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:16px 18px}
.tile b{display:block;font-size:26px;letter-spacing:-.02em}.tile span{color:var(--soft);font-size:13px}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(430px,1fr));gap:16px}
.card svg{width:100%;height:auto}.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:13.5px;background:var(--card);width:100%}
th,td{padding:6px 10px;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:var(--card)}
th{color:var(--soft);font-weight:600;cursor:pointer;user-select:none}
td.best{font-weight:700}tr.mean td{border-top:2px solid var(--line);font-weight:600}
.published{border-left:4px solid #d9822b}.note{font-size:13px}
details{margin:8px 0}summary{cursor:pointer;color:var(--mark)}code{background:#eef1f6;
padding:1px 5px;border-radius:5px;font-size:13px}
"""

SORT = """
document.querySelectorAll('th').forEach(th=>th.onclick=()=>{const t=th.closest('table'),
i=[...th.parentNode.children].indexOf(th),b=t.tBodies[0],up=th.dataset.up!=='1';th.dataset.up=up?'1':'';
const u={B:1,KiB:1024,MiB:1048576,GiB:1073741824,k:1e3,M:1e6,ms:.001,s:1,min:60};
const v=r=>{const m=r.children[i].innerText.match(/^(-?[\\d.]+) ?(\\w+)?/);
return m?parseFloat(m[1])*(u[m[2]]||1):-Infinity};
[...b.rows].sort((x,y)=>(i?v(x)-v(y):x.innerText.localeCompare(y.innerText))*(up?1:-1))
.forEach(r=>b.append(r))})
"""

REFERENCES = ("lora", "linear")
"""Methods that differences are told against, the first that is there."""


def write_report(
    folder: Path,
    out: Path,
    tasks: Sequence[str] = (),
    labels: Sequence[str] = (),
    suites: Sequence[str] = (),
    reference: str | None = None,
) -> tuple[Path, Path]:
    """Write `report.html` and `report.md` with its plots, from the results of a grid alone.

    Args:
        folder: Of the grid.
        out: Where to write.
        tasks, labels: To keep; empty for all.
        suites: Published tables to show beside, see `read_published`.
        reference: The method that others are compared with; default LoRA, else linear probing.

    Returns:
        The HTML and the Markdown file.

    Raises:
        FormatError: A result is malformed.
        DataError: Nothing is finished.
    """
    summary = summarise(folder, tasks, labels)
    parts = summary.coverage() or [("the tasks of each method", summary.tasks)]
    tables: list[tuple[str, list[Table], dict[str, str]]] = []
    for name, covered in parts:
        both = [tabulate_accuracy(summary, name, covered), tabulate_costs(summary, name, covered)]
        # Each set of tasks has its own: means over different tasks cannot be compared.
        tables.append((name, both, draw_plots(summary, covered, reference)))
    printed = [read_published(suite) for suite in suites]
    settings = tabulate_choices(summary)
    out.mkdir(parents=True, exist_ok=True)
    page, text = out / "report.html", out / "report.md"
    page.write_text(_write_html(summary, tables, printed, settings), encoding="utf-8")
    text.write_text(_write_markdown(summary, tables, printed, settings, out), encoding="utf-8")
    return page, text


def draw_plots(summary: Summary, tasks: Sequence[str], reference: str | None) -> dict[str, str]:
    """Draw the plots of a set of tasks: SVG texts by title."""
    labels = summary.of(tasks)
    drawings = {
        "Accuracy against parameters": figures.draw_scatter(
            summary, labels, tasks, read_parameters, "trained parameters without the head"
        ),
        "Accuracy against training memory": figures.draw_scatter(
            summary, labels, tasks, read_memory, "MiB of a step above weights", 2**20
        ),
        "Accuracy against training time": figures.draw_scatter(
            summary, labels, tasks, read_training_seconds, "processor seconds of a run"
        ),
        "Accuracy against inference time": figures.draw_scatter(
            summary, labels, tasks, read_inference, "forward over the bare backbone's"
        ),
        "Groups of tasks": figures.draw_group_bars(summary, labels, tasks),
        "Mean ranks": figures.draw_ranks(summary, labels, tasks),
    }
    # What is there of them: a grid need not have either.
    against = reference or next((n for n in REFERENCES if n in labels), labels[0])
    if against in labels and len(labels) > 1:
        others = [n for n in labels if n != against]
        compared = paired_bootstrap(summary, others, against, tasks)
        drawings[f"Difference to {against}"] = figures.draw_intervals(compared, against, labels)
    return {title: svg for title, svg in drawings.items() if svg is not None}


def _write_html(
    summary: Summary,
    parts: list[tuple[str, list[Table], dict[str, str]]],
    beside: list[Table],
    chosen: Table | None,
) -> str:
    body = [
        f"<h1>{html.escape(summary.grid['protocol']['backbone'])}</h1>",
        f'<p class="lead">{html.escape(summary.protocol())}.</p>',
        _write_tiles(summary),
    ]
    for name, tables, drawn in parts:
        body.append(f"<h2>{html.escape(name[:1].upper() + name[1:])}</h2>")
        body += [_write_card(table) for table in tables]
        cards = [
            f'<div class="card"><h3>{html.escape(title)}</h3>{svg}</div>'
            for title, svg in drawn.items()
        ]
        body.append(f'<div class="plots" style="margin-top:16px">{"".join(cards)}</div>')
    if chosen is not None:
        body.append(
            f"<details><summary>Settings chosen on validation</summary>{_write_card(chosen)}</details>"
        )
    if beside:
        body.append(
            "<h2>Published results</h2><p>Printed by their authors, on other backbones, "
            "images and budgets: never mixed with what was measured here.</p>"
        )
        body += [_write_card(table, "published") for table in beside]
    body.append(_write_notes(summary))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width"><title>restuning bench</title><style>{STYLE}</style>'
        f"<main>{''.join(body)}</main><script>{SORT}</script></html>\n"
    )


def _write_tiles(summary: Summary) -> str:
    tasks = summary.tasks
    labels = summary.of(tasks) or summary.labels
    tiles = [
        (str(len(tasks)), "tasks"),
        (str(len(summary.labels)), "methods"),
        (str(sum(len(c.runs) for c in summary.cells.values())), "final runs"),
    ]
    if summary.of(tasks):
        best = max(labels, key=lambda n: summary.mean(n, tasks)[0])
        tiles.append(
            (f"{words.format_percent(summary.mean(best, tasks)[0])} %", f"best mean: {best}")
        )
    inner = "".join(
        f'<div class="tile"><b>{html.escape(b)}</b><span>{html.escape(s)}</span></div>'
        for b, s in tiles
    )
    return f'<div class="tiles">{inner}</div>'


def _write_card(table: Table, kind: str = "") -> str:
    head = "".join(f"<th>{html.escape(c)}</th>" for c in table.columns)
    rows = []
    for row in table.rows:
        best = _find_best(row) if table.title.startswith("Accuracy") else set()
        cells = "".join(
            f"<td{' class=best' if n in best else ''}>{html.escape(cell)}</td>"
            for n, cell in enumerate(row)
        )
        rows.append(f"<tr{' class=mean' if row[0].startswith('mean') else ''}>{cells}</tr>")
    return (
        f'<div class="card {kind}" style="margin-top:16px"><h3>{html.escape(table.title)}</h3>'
        f'<p class="note">{html.escape(table.covers)}</p><div class="scroll"><table><thead><tr>{head}'
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div></div>"
    )


def _find_best(row: list[str]) -> set[int]:
    """The places in a row where its highest accuracy stands."""
    values = {n: float(c.split(" ")[0]) for n, c in enumerate(row) if n and c != "-"}
    return {n for n, v in values.items() if v == max(values.values())}


def _write_notes(summary: Summary) -> str:
    versions = html.escape(", ".join(f"{k} {v}" for k, v in summary.grid["versions"].items()))
    origin = f"Every number and picture here is made from the JSON of {len(summary.results)} runs"
    lines = [f"<p class=note>{origin} by <code>restuning bench report</code>. {versions}.</p>"]
    if summary.failures:
        rows = "".join(
            f"<li>{html.escape(r['task'])}, {html.escape(r['label'])}, {r['stage']} seed {r['seed']}: "
            f"{html.escape(r.get('error', '')[:200])}</li>"
            for r in summary.failures
        )
        lines.append(
            f"<details open><summary>{len(summary.failures)} runs failed</summary><ul>{rows}</ul></details>"
        )
    return "".join(lines)


def _write_markdown(
    summary: Summary,
    parts: list[tuple[str, list[Table], dict[str, str]]],
    beside: list[Table],
    chosen: Table | None,
    out: Path,
) -> str:
    lines = [f"# {summary.grid['protocol']['backbone']}", "", f"{summary.protocol()}.", ""]
    for number, (name, tables, drawn) in enumerate(parts):
        lines += [f"## {name[:1].upper() + name[1:]}", ""]
        lines += [table.markdown() for table in tables]
        for title, svg in drawn.items():
            # Numbered: two sets of tasks have plots of the same titles.
            file = f"{re.sub(r'[^a-z0-9]+', '-', title.lower())}-{number}.svg"
            (out / file).write_text(svg, encoding="utf-8")
            lines += [f"![{title}]({file})", ""]
    if chosen is not None:
        lines.append(chosen.markdown())
    if beside:
        lines += ["## Published results", ""]
        lines += [table.markdown() for table in beside]
    if summary.failures:
        lines += [f"{len(summary.failures)} runs failed:", ""]
        lines += [
            f"- {r['task']}, {r['label']}, {r['stage']} seed {r['seed']}: "
            f"{r.get('error', '').splitlines()[0][:200]}"
            for r in summary.failures
        ]
    return "\n".join(lines) + "\n"
