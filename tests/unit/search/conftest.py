"""A few digits before the embedded backbone, and a folder of light and dark images."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import Subset

import restuning
from restuning import FitSettings, Host
from restuning.data import load_data
from restuning.features import StoreOptions
from restuning.search import choose_method
from restuning.training.run import open_inputs

SETTINGS = FitSettings(epochs=1, batch_size=32)


class Secret:
    """A test split that may be counted and nothing else."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        raise AssertionError("the test split was read")


class World:
    def __init__(self, root):
        self.backbone = restuning.load_backbone("restuning-tiny")
        self.host = Host(self.backbone.model, *self.backbone.example)
        digits = load_data("digits", self.backbone)
        self.data = replace(
            digits,
            train=Subset(digits.train, range(96)),
            val=Subset(digits.val, range(48)),
            test=Secret(),
        )
        self.root = root

    def inputs(self, data=None):
        store = StoreOptions(root=self.root)
        return open_inputs(self.host, self.backbone, data or self.data, store)

    def choose(self, out, data=None, settings=SETTINGS, **more):
        return choose_method(self.inputs(data), settings, out, **more)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("stores"))


@pytest.fixture(scope="session")
def whole(world, tmp_path_factory):
    """A choice without limits among all candidates."""
    return world.choose(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="session")
def shades(tmp_path_factory):
    """Light and dark images, without a validation split."""
    root, rng = tmp_path_factory.mktemp("shades"), np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 8)):
        for number in range(count):
            folder = root / split / ("light" if number % 2 else "dark")
            folder.mkdir(parents=True, exist_ok=True)
            low = 130 * (number % 2)
            pixels = rng.integers(low, low + 120, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return root


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    return tmp_path_factory.mktemp("stores")


@pytest.fixture(scope="module")
def few():
    """A few digits, loaded already."""
    digits = load_data("digits", restuning.load_backbone("restuning-tiny"))
    return replace(
        digits,
        train=Subset(digits.train, range(96)),
        val=Subset(digits.val, range(48)),
        test=Subset(digits.test, range(48)),
    )
