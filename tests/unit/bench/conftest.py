"""A folder of two little tasks in the community's list layout, and grids on it."""

import json

import numpy as np
import pytest
from PIL import Image

from restuning.bench import GridProtocol, Job, find_tasks, list_runs, open_grid, parse_entries
from restuning.training import FitSettings

SIZES = {"train800": 24, "val200": 8, "test": 12}
PIXELS = 32


def make_task(folder, group, seed):
    """Two classes: light and dark images."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    lines = {}
    for split, count in SIZES.items():
        lines[split] = []
        for number in range(count):
            label = number % 2
            low = 130 if label else 0
            pixels = rng.integers(low, low + 120, (PIXELS, PIXELS, 3), dtype=np.uint8)
            name = f"images/{split}-{number}.png"
            Image.fromarray(pixels).save(folder / name)
            lines[split].append(f"{name} {label}\n")
        (folder / f"{split}.txt").write_text("".join(lines[split]))
    (folder / "train800val200.txt").write_text("".join(lines["train800"] + lines["val200"]))
    (folder / "task.json").write_text(json.dumps({"group": group, "classes": ["dark", "light"]}))


@pytest.fixture(scope="session")
def suite(tmp_path_factory):
    root = tmp_path_factory.mktemp("suite")
    make_task(root / "shades", "natural", 0)
    make_task(root / "tones", "structured", 1)
    (root / "no-task").mkdir()
    return root


@pytest.fixture
def grid(suite, tmp_path):
    """Makes the job of a grid in `tmp_path/grid`."""

    def make(methods="linear", tasks=("shades",), seeds=1, choices=None, folder=None, **settings):
        told = {"epochs": 1, "batch_size": 8, "lr": 1e-2, **settings}
        protocol = GridProtocol(
            "restuning-tiny", settings=FitSettings(**told), choices=choices or {}
        )
        runs = list_runs(protocol, find_tasks(str(suite), tasks), parse_entries(methods), seeds)
        folder = folder or tmp_path / "grid"
        open_grid(folder, protocol, runs)
        return Job(protocol, folder, runs)

    return make
