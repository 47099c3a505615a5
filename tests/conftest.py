"""What all tests share: seeds, threads, and models that are awake."""

import gc
import os
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A rich console keeps the width that it finds here when it is made: made later, it would have that of
# whichever test happened to be the first.
os.environ.pop("COLUMNS", None)
import restuning.cli.common  # noqa: E402, F401

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def shared_data() -> Path:
    default = Path(__file__).parents[1].parent / "shared" / "data"
    folder = Path(os.environ.get("RESTUNING_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no folder of real weights and tasks at {folder} (set RESTUNING_DATA)")
    return folder


def pytest_collection_finish():
    # Every run begins with a full collection, which would walk through a million objects of the
    # imported libraries each time.
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    # Or libraries that count what is left at the end would find all of it.
    gc.unfreeze()
    if "children" in sys.modules:
        sys.modules["children"].stop()


def pytest_terminal_summary(terminalreporter):
    failed = sum(len(terminalreporter.stats.get(k, ())) for k in ("failed", "error"))
    terminalreporter.write_line(f"{failed} failed")
