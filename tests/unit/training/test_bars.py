"""Where a training draws a bar: on a terminal, and in a notebook that can."""

import io
from importlib.util import find_spec as find

import pytest
from rich.console import Console

from restuning.runtime import shown
from restuning.runtime.shown import draws_bars
from restuning.training import log


@pytest.fixture
def widgets(monkeypatch):
    def give(there):
        monkeypatch.setattr(
            shown.importlib.util,
            "find_spec",
            lambda name: (object() if there else None) if name == "ipywidgets" else find(name),
        )

    return give


@pytest.mark.parametrize(
    ("how", "there", "drawn"),
    [
        ({"force_terminal": True}, False, True),
        ({"force_terminal": False}, True, False),
        ({"force_jupyter": True}, True, True),
        ({"force_jupyter": True}, False, False),
    ],
)
def test_a_bar_is_drawn_where_it_can_be_seen(widgets, how, there, drawn):
    widgets(there)
    assert draws_bars(Console(file=io.StringIO(), **how)) == drawn


def test_a_notebook_without_widgets_gets_lines(widgets, monkeypatch, capsys):
    widgets(False)
    monkeypatch.setattr(log, "Console", lambda **how: Console(force_jupyter=True))
    progress = log.Progress(6, 3, True)
    progress.start(0)
    for step in range(1, 7):
        progress.update(step, f"step {step}")
    progress.stop()
    assert capsys.readouterr().err.splitlines() == ["step 3", "step 6"]


def test_a_notebook_with_widgets_gets_the_bar(tmp_path):
    """A real kernel, where one is installed."""
    for name in ("nbclient", "ipykernel", "ipywidgets", "nbformat"):
        pytest.importorskip(name)
    import nbformat
    from nbclient import NotebookClient

    cell = (
        "from restuning.training.log import Progress\n"
        "progress = Progress(4, 2, True)\n"
        "progress.start(0)\n"
        "for step in range(1, 5):\n"
        "    progress.update(step, f'epoch {step}/4')\n"
        "progress.stop()\n"
    )
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    NotebookClient(book, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = book.cells[0].outputs
    kinds = [each.output_type for each in outputs]
    assert "error" not in kinds
    widgets = [
        o for o in outputs if "application/vnd.jupyter.widget-view+json" in o.get("data", {})
    ]
    assert len(widgets) == 1, outputs
    state = book.metadata["widgets"]["application/vnd.jupyter.widget-state+json"]["state"]
    assert "epoch 4/4" in str(state)
