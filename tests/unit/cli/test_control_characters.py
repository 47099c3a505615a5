"""Names that would steer a terminal or break a table are written out, wherever they come from."""

import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from commands import restuning
from restuning import Host, load_backbone, methods, save
from restuning.cli.common import RowStream, open_console
from restuning.cli.visible import make_visible, write_out_unknown

LABELS = ["\x1b[31mred", "new\nline", "turned \u202egnp", "\U0001f469\u200d\U0001f680", "\x9b2J"]
WRITTEN = [r"\x1b[31mred", r"new\nline", r"turned \u202egnp", LABELS[3], r"\x9b2J"]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    tiny = load_backbone("restuning-tiny")
    host = Host(tiny.model, *tiny.example)
    made = methods.build("linear", host, num_classes=len(LABELS))
    made.labels = LABELS
    folder = tmp_path_factory.mktemp("tasks") / "a.task"
    said = tiny.preprocessing.to_dict()
    return save(made, host, folder, backbone="restuning-tiny", preprocessing=said)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for name in ("\x1b[2J.png", "two\nlines.png"):
        Image.new("RGB", (32, 32)).save(root / name)
    (root / "note\x1b[2J.txt").write_text("none")
    return root


def is_steered(said):
    return any(c in said for c in "\x1b\x9b\u202e")


def test_what_is_plain_stays_and_what_steers_is_written_out():
    assert list(map(make_visible, LABELS)) == WRITTEN
    assert make_visible("a\nb\r", lines=True) == "a\nb\\r"
    assert make_visible("caf\udce9") == r"caf\udce9"
    assert make_visible("grün 猫 [red] $x$ C:\\new") == "grün 猫 [red] $x$ C:\\new"


def test_labels_are_written_out_by_info_and_predict(task, photos):
    for command in (
        ("info", task),
        ("predict", photos, "--task", task, "--top", 5),
        ("predict", photos, "--tasks", task),
        ("predict", photos / "no\x1b[2J.png", "--task", task),
        ("info", photos / "no\x1b[2J"),
    ):
        done = restuning(*command, COLUMNS="300")
        assert not is_steered(done.stdout + done.stderr), command
    done = restuning("predict", photos, "--task", task, "--top", 5, COLUMNS="300")
    # The names of the columns, a line an image, and the sentence below them.
    assert len(done.stdout.splitlines()) == 4
    assert all(label in done.stdout for label in WRITTEN)
    assert r"note\x1b[2J.txt" in done.stderr


def test_json_holds_labels_as_they_are(task, photos):
    done = restuning("predict", photos, "--task", task, "--top", 5, "--json")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert {p["label"] for p in answers[0]["predictions"]} == set(LABELS)
    assert {a["image"] for a in answers} == {
        str(photos / n) for n in ("\x1b[2J.png", "two\nlines.png")
    }


def test_classes_and_folders_are_written_out_while_training(tmp_path):
    rng = np.random.default_rng(0)
    root = tmp_path / "a\x1b[2Jset"
    for name in ("\x1b[31mred", "blue\n"):
        (root / name).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
        (root / name / "x\x1b[2J.txt").write_text("none")
    out = tmp_path / "out\x1b[2J"
    done = restuning("train", root, "--method", "linear", "--epochs", 1, "--no-cache", "--out", out)
    assert done.returncode == 0, done.stderr
    assert not is_steered(done.stdout + done.stderr)
    assert r"out\x1b[2J" in done.stdout


def test_a_row_of_a_stream_is_one_line(capsys):
    table = RowStream({"a\x1b": 3})
    table.row({"a\x1b": "x\ny"})
    assert capsys.readouterr().out.splitlines() == [r"a\x1b", r"x\ny"]


def test_a_console_writes_out_strings_in_and_outside_of_tables():
    stream = io.StringIO()
    open_console(file=stream).print("line\nof \x1b[2J")
    assert stream.getvalue() == "line\nof \\x1b[2J\n"


def test_an_output_without_a_character_gets_it_written_out(monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    write_out_unknown()
    print("caf\u00e9", file=narrow, flush=True)
    assert narrow.buffer.getvalue() == b"caf\\xe9\n"
