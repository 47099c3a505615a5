"""A store that Ray's workers write is that of one process, also where one of them is killed."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from restuning._errors import MissingExtraError
from restuning.features import StoreOptions, build_on_ray, build_store

PATIENCE = 300
SOURCE = str(Path(__file__).parents[2] / "src")


def test_without_ray_the_line_that_installs_it_is_told(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'restuning\[ray\]'"):
        build_on_ray("digits", options=StoreOptions(tmp_path))


def workers():
    """Processes of Ray that run a share."""
    found = []
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if each.read_bytes().startswith(b"ray::write_share"):
                found.append(int(each.parent.name))
        except OSError:
            pass
    return found


@pytest.mark.longer
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="workers are found in /proc")
def test_two_workers_of_which_one_is_killed_write_the_bytes_of_one_build(tmp_path):
    ray = pytest.importorskip("ray")
    pets = tmp_path / "pets"
    for split, count in (("train", 160), ("val", 16)):
        for number in range(count):
            file = pets / split / ("cat", "dog")[number % 2] / f"{number}.bmp"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (number, 3, 80)).save(file)

    told = []

    def how(place):
        # Two workers have the two cores: none of them has one for loader processes.
        return StoreOptions(
            tmp_path / place,
            batch_size=2,
            workers=None,
            shard_bytes=1,
            progress=False,
            log=told.append,
        )

    build_store(pets, tokens="cls", options=how("one"))
    killed = []

    def kill():
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and not killed:
            if len(list((tmp_path / "many").glob("*/train*.json"))) >= 4:
                for pid in workers()[:1]:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
            time.sleep(0.01)

    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": SOURCE}})
    try:
        thread = threading.Thread(target=kill)
        thread.start()
        store = build_on_ray(pets, tokens="cls", options=how("many"))
        thread.join()
    finally:
        ray.shutdown()
    assert killed
    assert any("2 shares" in line and "0 loader processes each" in line for line in told)
    (one,) = (tmp_path / "one").iterdir()
    names = sorted(p.name for p in one.iterdir())
    assert names == sorted(p.name for p in store.path.iterdir())
    assert all((one / name).read_bytes() == (store.path / name).read_bytes() for name in names)
