"""Rows of a table are added to a task that was trained on a column of one, and taken out again."""

import csv

import numpy as np
import pytest
from PIL import Image

import restuning
import sounds
from restuning._errors import DataError
from restuning.search.update import update
from zoo import folders

ROUNDING = 1e-3
"""Of logits: sums in another order, solved again."""


def write(file, header, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])
    return file


def pictures(where, start, stop):
    rows = []
    for n in range(start, stop):
        draw = np.random.default_rng(n)
        dark = n % 2
        pixels = draw.integers(0, 120, (32, 32, 3)) + (0 if dark else 120)
        (where / "files").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(where / f"files/{n}.png")
        rows.append((f"files/{n}.png", "dark" if dark else "bright", n))
    return write(where / f"{start}.csv", ("picture", "light", "number"), rows)


def tones(where, start, stop):
    rows = []
    for n in range(start, stop):
        pitch = 300 if n % 2 else 1500
        sounds.write(where / f"files/{n}.wav", sounds.tone(pitch + n, 0.3, seed=n))
        rows.append((f"files/{n}.wav", "low" if n % 2 else "high", n))
    return write(where / f"{start}.csv", ("sound", "pitch", "number"), rows)


def reviews(where, start, stop):
    rows = []
    for n in range(start, stop):
        word = ("good", "bad")[n % 2]
        rows.append((f"a {word} film" + " very" * (n % 5) + " the" * (n // 10), word, n))
    return write(where / f"{start}.csv", ("review", "verdict", "number"), rows)


KINDS = {
    "image": (pictures, {"image": "picture", "label": "light"}),
    "audio": (tones, {"audio": "sound", "label": "pitch"}),
    "text": (reviews, {"text": "review", "label": "verdict"}),
}


def backbone_of(kind, where):
    if kind == "image":
        return "restuning-tiny"
    made = folders.bert(where) if kind == "text" else sounds.save("ast", where)
    return f"hf:{made}"


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_table_are_added_and_taken_out_again(kind, tmp_path):
    draw, columns = KINDS[kind]
    where = tmp_path / "data"
    first, more = draw(where, 0, 60), draw(where, 60, 90)
    told = {**columns, "problem": "single-label"} if kind == "text" else columns
    run = restuning.train(
        first,
        backbone=backbone_of(kind, tmp_path / "model"),
        method="ridge",
        out=tmp_path / "run",
        store=tmp_path / "store",
        report=False,
        **told,
    )
    before = run.metrics["test_accuracy"]
    added = update(run.folder, more, **columns)
    assert added.rows == (42, 72)
    again = update(run.folder, more, **columns)
    assert (again.rows, again.skipped) == ((72, 72), 30)
    out = update(run.folder, more, remove=True, **columns)
    assert out.rows == (72, 42)
    predictor = restuning.Predictor.load(run.folder)
    assert before > 0.9
    (names,) = predictor.labels.values()
    assert (
        sorted(names)
        == {
            "image": ["bright", "dark"],
            "audio": ["high", "low"],
            "text": ["bad", "good"],
        }[kind]
    )


def test_several_columns_of_answers_are_refused_in_a_sentence(tmp_path):
    first = pictures(tmp_path / "data", 0, 40)
    run = restuning.train(
        first,
        method="ridge",
        image="picture",
        label="light",
        out=tmp_path / "run",
        store=tmp_path / "store",
        report=False,
    )
    with pytest.raises(DataError, match=r"(?s)several columns.*light, number.*--label COLUMN"):
        update(run.folder, first, image="picture", label="light,number")
    with pytest.raises(DataError, match="(?s)under another class.*line 2"):
        update(run.folder, first, image="picture", label="number")
