"""A real browser for the tests of pages."""

import shutil
from contextlib import contextmanager

import pytest


@contextmanager
def launched():
    """Chromium without a window; where it is not there, the test is skipped."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("no chromium here (apt install chromium)")
    with playwright.sync_playwright() as run:
        opened = run.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()
