"""A pass over tars, killed as the operating system kills, ends with the bytes of one that was not."""

import os

from killed import MARKS, ended, started, try_to_kill

from tars import shots

pytestmark = MARKS

KILLS = 10


def _files(root):
    (folder,) = root.iterdir()
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_ten_kills_on_tars_leave_the_bytes_of_an_unbroken_pass(tmp_path, monkeypatch):
    monkeypatch.setenv("RESTUNING_CACHE", str(tmp_path / "cache"))
    folder = shots(tmp_path / "w", 4, 60)

    def cache(place):
        how = ("--batch-size", 4, "--shard-size", "1KB", "--workers", 0)
        return started("cache", folder, *how, "--store", tmp_path / place)

    ended(cache("one"))
    whole = len(_files(tmp_path / "one"))
    done = 0
    for number in range(1, KILLS + 1):
        # Each goes a little further than the one before.
        wanted = number * whole // (2 * KILLS)
        killed, told = try_to_kill(
            cache("many"), lambda wanted=wanted: _count(tmp_path / "many") >= wanted
        )
        assert killed, told
        done += 1
    assert done == KILLS and not list((tmp_path / "many").glob("*/manifest.json"))
    ended(cache("many"))
    assert _files(tmp_path / "one") == _files(tmp_path / "many")


def _count(root):
    if not root.is_dir():
        return 0
    return sum(len(files) for _, _, files in os.walk(root))
