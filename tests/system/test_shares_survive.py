"""Workers as processes of their own, killed as the operating system kills them."""

import numpy as np
import pytest
from killed import MARKS, ended, kill_when, started
from PIL import Image

pytestmark = MARKS


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("data") / "noise", np.random.default_rng(0)
    for number in range(160):
        file = folder / ("a", "b")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(file)
    return folder


def test_of_two_workers_one_is_killed_and_started_again(noise, tmp_path):
    def cache(place, *more):
        how = ("--batch-size", 4, "--shard-size", "1KB", "--workers", 0)
        return started("cache", noise, *how, "--store", tmp_path / place, *more)

    killed, other = (cache("many", "--shard", f"{n}/2") for n in (1, 2))
    kill_when(killed, lambda: len(list((tmp_path / "many").glob("*/train.*.json"))) > 10)
    assert "share 2/2 is whole" in ended(other)
    assert "share 1/2 is whole" in ended(cache("many", "--shard", "1/2"))
    ended(started("cache", "merge", noise, "--store", tmp_path / "many"))
    ended(cache("one"))
    (one,), (many,) = ((tmp_path / place).iterdir() for place in ("one", "many"))
    files = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in (one, many)]
    assert files[0] == files[1]
