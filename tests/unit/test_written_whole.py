"""Files are whole or not there, whatever happens to their writer; claims are given back by the dead."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from restuning import _files
from restuning._errors import FormatError, TrainingError
from restuning._files import (
    Claim,
    differences,
    hold_folder,
    lies_inside,
    open_plain,
    parse_json,
    read_bytes,
    read_json,
    refuse_other,
    replacing,
    sha256_of_file,
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


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_what_a_library_leaves_beside_a_file_goes_with_the_process_that_died(tmp_path):
    process = child(
        """
        with replacing(Path(sys.argv[1]), apart=True) as aside:
            aside.write_text("half")
            (aside.parent / ".tmpLIBRARY").write_text("half")
            time.sleep(600)
        """,
        tmp_path / "a",
    )
    until(lambda: any(tmp_path.rglob(".tmpLIBRARY")))
    process.send_signal(signal.SIGKILL)
    process.wait()
    with _files.replacing(tmp_path / "a", apart=True) as aside:
        aside.write_text("whole")
        (aside.parent / ".tmpLIBRARY").write_text("half")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "whole"


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


MALFORMED = {
    "not UTF-8": b'{"a": "\xff"}',
    "half of a surrogate pair": b'{"a": "\\ud800"}',
    "such a name": b'{"\\udfff": 1}',
    "NaN": b'{"a": NaN}',
    "infinite": b'{"a": [-Infinity]}',
    "too large for a float": b'{"a": 1e999}',
    "too large for a tensor": b'{"a": 9223372036854775808}',
    "thousands of digits": b'{"a": ' + b"9" * 5000 + b"}",
    "a name twice": b'{"a": {"b": 1, "b": 2}}',
    "deep": b'{"a": ' + b"[" * 65 + b"]" * 65 + b"}",
    "deeper than Python goes": b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}",
    "millions of values": b'{"a": [' + b"[]," * 2**20 + b"1]}",
    "cut off": b'{"a": ',
    "two objects": b"{}{}",
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_json_that_others_would_read_otherwise_or_that_takes_memory_is_refused(tmp_path, kind):
    (tmp_path / "a.json").write_bytes(MALFORMED[kind])
    with pytest.raises(FormatError) as told:
        read_json(tmp_path / "a.json", what="a plan", fix="make it again")
    assert told.value.what == "a plan cannot be read"
    assert told.value.fix == "make it again"
    with pytest.raises(FormatError):
        parse_json(MALFORMED[kind], "here")


def test_json_larger_than_the_limit_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(10 * _files.JSON_BYTES)
    with pytest.raises(FormatError, match="bytes, and at most"):
        read_json(tmp_path / "a.json")


def test_a_mark_of_an_editor_is_passed_over_and_what_json_has_no_word_for_is_null(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}
    write_json(tmp_path / "b.json", {"a": [float("nan"), 1.5, float("-inf")], "b": (1, 2)})
    assert read_json(tmp_path / "b.json") == {"a": [None, 1.5, None], "b": [1, 2]}


@pytest.mark.parametrize(
    ("old", "new"), [("0.75", "0.25"), ('"kept"', '"kelt"'), ("[1,", "[2,"), (' "b"', ' "c"')]
)
def test_a_sealed_object_tells_of_a_change_of_any_value_or_name(tmp_path, old, new):
    file = tmp_path / "a.json"
    content = {"a": 0.75, "b": {"kept": [1, 2]}, "where": tmp_path}
    write_json(file, content, sealed=True)
    assert read_json(file, sealed=True) == {**content, "where": str(tmp_path)}
    text = json.dumps(json.loads(file.read_text()))
    assert read_json_text(file, text) == read_json(file)
    assert old in text
    with pytest.raises(FormatError, match="do not match their sha256"):
        read_json_text(file, text.replace(old, new, 1))


def read_json_text(file, text):
    file.write_text(text)
    return read_json(file)


def test_an_object_without_a_seal_is_read_where_none_is_asked_for(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    assert read_json(tmp_path / "a.json") == {"a": 1}
    with pytest.raises(FormatError):
        read_json(tmp_path / "a.json", sealed=True)


def make_special(kind, path):
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        # A path of a socket is short, and those of tests are not.
        here = os.getcwd()
        os.chdir(path.parent)
        try:
            socket.socket(socket.AF_UNIX).bind(path.name)
        finally:
            os.chdir(here)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link to a pipe":
        os.mkfifo(path.with_name("pipe"))
        path.symlink_to("pipe")
    elif kind == "link to nothing":
        path.symlink_to("nowhere")
    else:
        path.symlink_to(path)


SPECIAL = ["folder", "pipe", "socket", "device", "link to a pipe", "link to nothing", "own link"]


@pytest.mark.skipif(os.name != "posix", reason="files of POSIX")
@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_file_is_refused_in_words_and_not_waited_for(tmp_path, kind):
    path = tmp_path / "a.json"
    make_special(kind, path)
    with pytest.raises(FormatError, match="cannot be read"):
        read_json(path)
    for read in (sha256_of_file, read_bytes, open_plain):
        with pytest.raises(OSError) as told:
            read(path)
        assert told.value.strerror


@pytest.mark.skipif(os.name != "posix", reason="files of POSIX")
@pytest.mark.parametrize("kind", SPECIAL)
def test_no_lock_is_made_where_something_else_lies(tmp_path, kind):
    make_special(kind, tmp_path / "a.lock")
    with pytest.raises(FormatError, match="a lock cannot be made"):
        Claim.take(tmp_path / "a.lock", wait=True)
    assert not (tmp_path / "nowhere").exists()


def test_a_lock_that_is_a_link_leaves_the_file_behind_it_alone_and_unlocked(tmp_path):
    ours = tmp_path / "thesis.txt"
    ours.write_text("years of work")
    (tmp_path / "a.lock").symlink_to(ours)
    (tmp_path / "locks").symlink_to(tmp_path / "nowhere")
    for lock in (tmp_path / "a.lock", tmp_path / "locks" / "b.lock", ours / "c.lock"):
        with pytest.raises(FormatError, match="a lock cannot be made"):
            Claim.take(lock, wait=True)
    assert ours.read_text() == "years of work"
    with Claim.take(ours, wait=False) as claim:
        # A lock neither empties the file nor removes it.
        assert claim is not None
    assert ours.read_text() == "years of work"


def test_a_lock_whose_file_is_removed_meanwhile_is_taken_on_the_one_that_has_its_name(tmp_path):
    file = tmp_path / "a.lock"
    first = Claim.take(file, wait=True)
    taken = []
    waiting = threading.Thread(target=lambda: taken.append(Claim.take(file, wait=True)))
    waiting.start()
    time.sleep(0.05)
    file.unlink()
    first.give_back()
    waiting.join(WAIT)
    assert taken
    assert Claim.take(file, wait=False) is None
    taken[0].give_back()


def test_a_place_aside_is_not_one_that_could_be_foreseen(tmp_path):
    with replacing(tmp_path / "a") as one:
        one.touch()
    with replacing(tmp_path / "a") as other:
        other.touch()
    assert one.name.split("-")[-1] != other.name.split("-")[-1]


def test_a_folder_is_held_by_one_and_nothing_stays_of_that(tmp_path):
    folder = tmp_path / "runs" / "one"
    with hold_folder(folder), hold_folder(folder):
        told = []

        def other():
            try:
                with hold_folder(folder):
                    told.append("held")
            except TrainingError as error:
                told.append(str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert "another process works in this folder" in told[0]
        assert str(os.getpid()) in told[0]
    # What was made for it and is empty goes, what was put there stays.
    assert not (tmp_path / "runs").exists()
    with hold_folder(folder):
        (folder / "result").write_text("1")
    assert [p.name for p in folder.iterdir()] == ["result"]


def test_the_lock_of_a_process_that_died_is_taken_and_one_that_is_a_link_is_not(tmp_path):
    (tmp_path / ".lock").write_text("elsewhere 1")
    with hold_folder(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()
    assert not list(tmp_path.iterdir())
    target = tmp_path.parent / f"{tmp_path.name}.target"
    target.write_text("mine")
    (tmp_path / ".lock").symlink_to(target)
    with pytest.raises(TrainingError, match="cannot be written"), hold_folder(tmp_path):
        pass
    assert target.read_text() == "mine"


def test_what_lies_inside_of_a_folder_is_told_with_links_followed(tmp_path):
    folder, away = tmp_path / "folder", tmp_path / "away"
    for made in (folder, away):
        made.mkdir()
        (made / "file").touch()
    links = {"out": away, "up": tmp_path, "in": folder / "file", "self": folder}
    # Some versions of Python find a path for those that go in a circle.
    links |= {"circle": folder / "circle", "there": folder / "back", "back": folder / "there"}
    for name, to in links.items():
        (folder / name).symlink_to(to)
    (tmp_path / "linked").symlink_to(folder)
    inside = {
        **dict.fromkeys(["file", "in", "self/file", "not there", "../linked/file"], True),
        **dict.fromkeys(["out", "out/file", "up/away/file", "../away/file", f"{away}/file"], False),
        **dict.fromkeys(["circle", "circle/file", "there", "back/file"], False),
    }
    for home in (folder, tmp_path / "linked"):
        assert {n: lies_inside(home / n, home) for n in inside} == inside
    assert lies_inside(folder / "out", folder, away)
    with pytest.raises(ValueError, match="null"):
        lies_inside(folder / "a\0", folder)
