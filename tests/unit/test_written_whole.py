"""Files are whole or not there, whatever happens to their writer; claims are given back by the dead."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from restuning import _files
from restuning._errors import FormatError, TrainingError
from restuning._files import (
    Claim,
    differences,
    read_json,
    refuse_other,
    replacing,
    write_bytes,
    write_json,
    write_text,
)

WAIT = 30
"""Seconds that a child may take to start on a busy machine."""


def child(code, *arguments):
    lines = "import sys, time\nfrom pathlib import Path\nfrom restuning._files import *\n"
    code = lines + textwrap.dedent(code)
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)])


def until(there):
    end = time.monotonic() + WAIT
    while not there():
        assert time.monotonic() < end, "the child did not come so far"
        time.sleep(0.01)


def test_what_is_written_is_read_again_and_nothing_is_left_aside(tmp_path):
    write_json(tmp_path / "deep" / "a.json", {"a": 1, "where": tmp_path})
    assert read_json(tmp_path / "deep" / "a.json") == {"a": 1, "where": str(tmp_path)}
    write_text(tmp_path / "b.txt", "grün\n")
    assert (tmp_path / "b.txt").read_bytes() == "grün\n".encode()
    write_bytes(tmp_path / "b.txt", b"other")
    assert (tmp_path / "b.txt").read_bytes() == b"other"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.json", "b.txt", "deep"]


def test_a_folder_appears_at_once(tmp_path):
    with replacing(tmp_path / "store") as aside:
        aside.mkdir()
        (aside / "a").write_text("1")
        assert not (tmp_path / "store").exists()
    assert (tmp_path / "store" / "a").read_text() == "1"


def test_a_suffix_that_a_library_looks_at_is_the_end_of_the_name(tmp_path):
    with replacing(tmp_path / "model.pt2", suffix=".pt2") as aside:
        assert aside.name.endswith(".pt2")
        aside.write_bytes(b"x")
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt2"]


def test_two_writers_of_one_file_have_two_places_aside(tmp_path):
    with replacing(tmp_path / "a") as one, replacing(tmp_path / "a") as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    # The outer one is renamed last.
    assert (tmp_path / "a").read_text() == "one"


def test_an_error_leaves_what_was_there_and_nothing_aside(tmp_path):
    write_text(tmp_path / "a", "before")
    with pytest.raises(RuntimeError), replacing(tmp_path / "a") as aside:
        aside.write_text("half")
        raise RuntimeError
    assert (tmp_path / "a").read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_is_told_in_words_and_leaves_what_was_there(tmp_path, monkeypatch, step):
    write_json(tmp_path / "a.json", {"a": 1})

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if step == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(_files.Path, "replace", full)
    with pytest.raises(FormatError, match="No space left") as told:
        write_json(tmp_path / "a.json", {"a": 2})
    assert "free space" in told.value.fix
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_writer_that_is_killed_before_the_rename_leaves_the_old_file_and_the_next_cleans_up(
    tmp_path,
):
    write_text(tmp_path / "a", "before")
    process = child(
        """
        with replacing(Path(sys.argv[1])) as aside:
            aside.write_text("half")
            time.sleep(600)
        """,
        tmp_path / "a",
    )
    until(lambda: len(list(tmp_path.iterdir())) == 2)
    alive = next(p for p in tmp_path.iterdir() if p.name != "a")
    write_text(tmp_path / "a", "between")
    assert alive.exists(), "its writer lives"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "a").read_text() == "between"
    write_text(tmp_path / "a", "after")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_what_another_machine_left_long_ago_is_removed_and_what_is_fresh_is_not(tmp_path):
    old, fresh = (tmp_path / f".a.elsewhere.{n}.0.partial" for n in (1, 2))
    for file in (old, fresh):
        file.write_text("half")
    long_ago = time.time() - 2 * _files.ABANDONED
    os.utime(old, (long_ago, long_ago))
    write_text(tmp_path / "a", "whole")
    assert not old.exists()
    assert fresh.exists()


def test_a_claim_is_one_process_s_at_a_time_and_is_given_back(tmp_path):
    with Claim.take(tmp_path / "locks" / "a.lock", wait=False):
        assert Claim.take(tmp_path / "locks" / "a.lock", wait=False) is None
    again = Claim.take(tmp_path / "locks" / "a.lock", wait=True)
    assert again is not None
    again.give_back()


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_process_that_dies_gives_its_claim_back(tmp_path):
    process = child(
        """
        claim = Claim.take(Path(sys.argv[1]), wait=True)
        Path(sys.argv[2]).touch()
        time.sleep(600)
        """,
        tmp_path / "a.lock",
        tmp_path / "taken",
    )
    until((tmp_path / "taken").exists)
    assert Claim.take(tmp_path / "a.lock", wait=False) is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    claim = Claim.take(tmp_path / "a.lock", wait=True)
    assert claim is not None
    claim.give_back()


def test_two_processes_count_to_a_hundred_without_losing_one(tmp_path):
    count = """
        file = Path(sys.argv[1])
        for _ in range(50):
            with Claim.take(file.with_suffix(".lock"), wait=True):
                number = read_json(file)["n"] if file.exists() else 0
                write_json(file, {"n": number + 1})
        """
    both = [child(count, tmp_path / "n.json") for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert read_json(tmp_path / "n.json") == {"n": 100}


def test_a_folder_of_something_else_is_refused_with_all_that_differs(tmp_path):
    before = {"method": "linear", "settings": {"lr": 1, "epochs": 2}, "seed": 0}
    now = {"method": "linear", "settings": {"lr": 3, "epochs": 2}, "more": True}
    assert differences(before, now) == [
        "lr: 1 then, 3 now",
        "seed: 0 then, None now",
        "more: None then, True now",
    ]
    refuse_other(before, dict(before), tmp_path, what="another", fix="go")
    with pytest.raises(TrainingError, match="another") as told:
        refuse_other(before, now, tmp_path, what="another", fix="go")
    assert "lr: 1 then, 3 now" in told.value.found


@pytest.mark.parametrize("content", ["", "[]", "{", "1"])
def test_what_is_no_object_is_refused_with_its_file(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(FormatError, match=r"a\.json"):
        read_json(tmp_path / "a.json")
