"""Reports are made from the JSON alone, the same twice, and never mix what was published in."""

import json
import re
import shutil

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from restuning import RestuningError
from restuning._errors import RestuningWarning
from restuning._files import write_json
from restuning.bench.folder import pack_hits
from restuning.bench.report import (
    critical_difference,
    mean_ranks,
    paired_bootstrap,
    published_tables,
    read_published,
    summarise,
    write_report,
)
from restuning.bench.report.figures import HIGH, LIFT, WIDE, draw_scatter, spread_labels
from restuning.bench.report.tables import Table

PIXELS = st.tuples(st.floats(0, 400), st.floats(0, 300))
SMALL = 0.02
"""Of accuracy: the interval of a mean over 2000 resamples of 400 images wanders by less."""


def result(task, group, label, seed, hits, **more):
    hits = np.asarray(hits, bool)
    return {
        "format": 1,
        "status": "done",
        "task": task,
        "group": group,
        "label": label,
        "method": label,
        "stage": "final",
        "seed": seed,
        "split": "test",
        "accuracy": float(hits.mean()),
        "count": len(hits),
        "hits": pack_hits(hits),
        "setting": {"lr": 0.001},
        "chosen": {"among": []},
        "options": {},
        "parameters": {
            "trained": 110 * len(label),
            "without_head": 100 * len(label) - 600,
            "backbone": 9,
        },
        "memory": {"step_bytes": 2**20, "live_step_bytes": 2**21},
        "seconds": {
            "step": 0.1,
            "train_cpu": 3.0,
            "features_cpu": 1.0,
            "whole": 9.0,
            "inference": 0.002,
            "bare_inference": 0.001,
        },
        "settings": {"lr": 0.001},
        "data": {},
        "versions": {},
        "file_bytes": 1000,
        "hardware": {"cpu": "a processor", "threads": 1},
        **more,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two tasks; `better` is right where `linear` is and on a tenth more; `alone` has one task."""
    root = tmp_path_factory.mktemp("grid")
    rng = np.random.default_rng(0)
    for task, group in (("a", "natural"), ("b", "structured")):
        for seed in range(3):
            base = rng.random(400) < 0.6
            for label, hits in (("linear", base), ("better", base | (rng.random(400) < 0.25))):
                made = result(task, group, label, seed, hits)
                write_json(root / "runs" / task / label / f"final.seed={seed}.json", made)
    write_json(root / "runs/a/alone/final.seed=0.json", result("a", "natural", "alone", 0, base))
    failed = {
        "format": 1,
        "status": "failed",
        "task": "b",
        "label": "alone",
        "method": "alone",
        "group": "structured",
        "stage": "final",
        "seed": 0,
        "error": "TrainingError: diverged",
    }
    write_json(root / "runs/b/alone/final.seed=0.json", failed)
    settings = {"epochs": 3, "batch_size": 64, "precision": "no"}
    write_json(
        root / "grid.json",
        {
            "format": 1,
            "versions": {"torch": "2"},
            "protocol": {"backbone": "a-backbone@112", "settings": settings},
        },
    )
    return root


def test_a_report_is_the_same_when_it_is_made_again(folder, tmp_path):
    first = write_report(folder, tmp_path / "one", suites=["vtab-1k", "cifar100"])
    again = write_report(folder, tmp_path / "two", suites=["vtab-1k", "cifar100"])
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in again]
    names = {p.name for p in (tmp_path / "one").iterdir()}
    assert names == {p.name for p in (tmp_path / "two").iterdir()} and len(names) > 8


def test_the_page_needs_nothing_else_and_says_what_it_covers(folder, tmp_path):
    page, text = write_report(folder, tmp_path / "out", suites=["vtab-1k"])
    html = page.read_text()
    assert not re.search(r'(src|href)="(?!#)', html.replace("xlink:href", "href"))
    for words in ("a-backbone@112", "3 epochs", "batch 64", "diverged", "not measured here"):
        assert words in html and words in text.read_text()


def test_the_means_of_a_table_are_those_of_the_json(folder, tmp_path):
    summary = summarise(folder)
    by_hand = []
    for task in ("a", "b"):
        files = (folder / "runs" / task / "better").glob("*.json")
        by_hand.append(np.mean([json.loads(f.read_text())["accuracy"] for f in files]))
    assert summary.mean("better", ["a", "b"])[0] == pytest.approx(np.mean(by_hand))
    assert summary.mean_of_groups("better", ["a", "b"]) == pytest.approx(np.mean(by_hand))
    row = f"| mean of groups | {100 * np.mean(by_hand):.1f} |"
    text = write_report(folder, tmp_path / "out", labels=["better"])[1].read_text()
    assert row in text


def test_a_method_without_all_tasks_is_shown_on_those_that_all_have(folder):
    summary = summarise(folder)
    assert summary.coverage() == [
        ("all tasks", ["a", "b"]),
        ("the tasks that every method has", ["a"]),
    ]
    assert "alone" not in summary.of(["a", "b"]) and "alone" in summary.of(["a"])


def test_the_bootstrap_is_sure_of_a_real_difference_and_not_of_none(folder):
    summary = summarise(folder)
    found = paired_bootstrap(summary, ["better"], "linear", ["a", "b"])["better"]
    assert found.sure and found.low < found.mean < found.high
    assert found.mean == pytest.approx(
        summary.mean("better", ["a", "b"])[0] - summary.mean("linear", ["a", "b"])[0]
    )
    assert found.high - found.low < 4 * SMALL
    same = paired_bootstrap(summary, ["linear"], "linear", ["a", "b"])
    assert same == {} or not same["linear"].sure


def test_ranks_and_the_critical_difference_are_those_of_the_textbook(folder):
    assert mean_ranks(summarise(folder), ["linear", "better"], ["a", "b"]) == {
        "linear": 2.0,
        "better": 1.0,
    }
    # Demsar 2006, Table 5a: q_0.05 of 4 methods is 2.569; his example has 14 data sets.
    assert critical_difference(4, 14) == pytest.approx(2.569 * np.sqrt(4 * 5 / (6 * 14)), abs=1e-3)


def test_methods_that_are_level_share_their_ranks():
    from types import SimpleNamespace

    from scipy.stats import rankdata

    table = np.array([[0.5, 0.7, 0.5, 0.9], [0.3, 0.3, 0.3, 0.1]])
    cells = {(t, n): SimpleNamespace(mean=table[t, n]) for t in range(2) for n in range(4)}
    ranks = mean_ranks(SimpleNamespace(cells=cells), range(4), range(2))
    assert [ranks[n] for n in range(4)] == rankdata(-table, axis=1).mean(0).tolist()


def test_a_report_without_scipy_has_all_but_the_plot_of_ranks(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scipy.stats", None)
    with pytest.warns(RestuningWarning, match=r"pip install 'restuning\[bench\]'"):
        page, _ = write_report(folder, tmp_path)
    text = page.read_text(encoding="utf-8")
    assert "Groups of tasks" in text and "Mean ranks" not in text


def test_published_tables_are_as_printed():
    rows = published_tables()["vtab-1k"]["rows"]
    assert rows["Res-Tuning"][:3] == [75.2, 92.7, 71.9] and rows["RT-Bypass"][-4:-2] == [
        72.32,
        69.51,
    ]
    for suite, table in published_tables().items():
        assert table["source"] and table["title"]
        assert {len(row) for row in table["rows"].values()} == {len(table["columns"])}
        assert "not measured here" in read_published(suite).covers


@pytest.mark.parametrize("damage", ["{", '{"format": 9}', "[]"])
def test_a_malformed_result_is_refused_and_named(folder, tmp_path, damage):
    shutil.copytree(folder, tmp_path / "grid")
    (tmp_path / "grid/runs/a/linear/final.seed=1.json").write_text(damage)
    with pytest.raises(RestuningError, match=r"final\.seed=1\.json"):
        write_report(tmp_path / "grid", tmp_path / "out")


def test_a_grid_without_finished_runs_is_refused(folder, tmp_path):
    with pytest.raises(RestuningError, match="no finished run"):
        summarise(folder, tasks=["nothing"])


@settings(max_examples=50, deadline=None)
@given(points=st.lists(PIXELS, max_size=12))
def test_names_of_points_do_not_lie_on_each_other(points):
    names = [(x, y) for (x, _), y in zip(points, spread_labels(points), strict=True)]
    for number, (x, y) in enumerate(names):
        for a, b in names[:number]:
            assert abs(x - a) >= WIDE or abs(y - b) >= HIGH


def test_the_name_of_a_point_that_stands_alone_is_right_above_it():
    assert spread_labels([(0.0, 10.0), (2.0 * WIDE, 10.0)]) == [10.0 + LIFT, 10.0 + LIFT]


def test_labels_are_written_as_they_are_into_page_and_pictures(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "grid")
    rng = np.random.default_rng(1)
    strange = ("<b>[red]</b>", r"$x_{$", ":cat:|&amp;")
    for task, group in (("a", "natural"), ("b", "structured")):
        for place, label in enumerate(strange):
            for seed in range(3):
                made = result(task, group, label, seed, rng.random(400) < 0.5)
                file = tmp_path / f"grid/runs/{task}/strange{place}/final.seed={seed}.json"
                write_json(file, made)
    html = write_report(tmp_path / "grid", tmp_path / "out")[0].read_text()
    assert "<b>[red]" not in html
    for written in ("&lt;b&gt;[red]&lt;/b&gt;", "$x_{$", ":cat:|&amp;amp;"):
        assert written in html


@pytest.mark.parametrize("costs", [(12, 75), (0, 33_000), (900, 4_000_000), (0.01, 0.2)])
def test_numbers_on_a_logarithmic_axis_are_plain(costs):
    class Two:
        """A summary of two methods."""

        def cost(self, label, tasks, of):
            return costs[int(label)]

        def mean(self, label, tasks):
            return 0.5 + 0.1 * int(label), 0.01

    svg = draw_scatter(Two(), ["0", "1"], ["digits"], lambda result: 0, "a cost")
    told = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    numbers = [word for word in told if re.fullmatch(r"[\d,.e+-]+", word)]
    # Of the axis of costs and of that of accuracies.
    assert len(numbers) >= 5
    assert not any("$" in word or "\\" in word for word in told)


def test_a_row_of_a_markdown_table_is_one_line_whatever_a_task_is_called():
    text = Table("a title", "what it covers", ["task", "a|b"], [["two\nlines", "1"]]).markdown()
    assert text.splitlines()[4:] == ["| task | a\\|b |", "|---|---:|", "| two lines | 1 |"]
