"""Texts as people have them: rows, cells, encodings, line ends, blanks, names of splits."""

import csv
import warnings

import pytest

from restuning._errors import DataError, RestuningWarning
from restuning.data import load_data, read_csv, read_list
from restuning.data.text_files import read_lines, split_lines

ROWS = [("good film", "pos"), ("bad film", "neg")] * 8


def write(file, rows, header="text,label", separator=",", encoding="utf-8", end="\n"):
    lines = [header, *(separator.join(row) for row in rows)]
    file.write_bytes(end.join([*lines, ""]).encode(encoding))
    return file


# ------------------------------------------------------------------------ rows and cells


@pytest.mark.parametrize(
    "row",
    ["bad, really bad,neg", "fine,pos,", "good,pos,,,", "poor, dull,neg", "fine", '"fine, pos"'],
)
def test_a_row_with_more_or_fewer_cells_than_columns_is_refused_by_its_line(row, tmp_path):
    file = write(tmp_path / "a.csv", [*ROWS[:3], (row,), *ROWS])
    with pytest.raises(DataError, match=r"(more|fewer) cells[\s\S]*line 5"):
        read_csv(file, "text", "label")


def test_the_line_of_a_bad_row_is_counted_over_cells_of_several_lines(tmp_path):
    file = write(tmp_path / "a.csv", [('"good\nold\nfilm"', "pos"), ("a", "b", "c")])
    with pytest.raises(DataError, match="line 5"):
        read_csv(file, "text", "label")


@pytest.mark.parametrize("rows", [[('"good', "pos"), *ROWS], [('"good" film', "pos"), *ROWS]])
def test_a_quote_that_does_not_close_where_its_cell_ends_swallows_no_rows(rows, tmp_path):
    with pytest.raises(DataError, match="close every quote"):
        read_csv(write(tmp_path / "a.csv", rows), "text", "label")


def test_quotes_inside_of_a_cell_without_quotes_are_letters(tmp_path):
    file = write(tmp_path / "a.csv", [('a 5" pipe', "pos")])
    assert read_csv(file, "text", "label") == [('a 5" pipe', "pos")]


@pytest.mark.parametrize("letters", [131_073, 400_000])
def test_a_cell_has_any_length(letters, tmp_path):
    file = write(tmp_path / "a.csv", [("x" * letters, "pos")])
    assert read_csv(file, "text", "label") == [("x" * letters, "pos")]


def test_the_limit_of_other_readers_is_never_lowered(tmp_path):
    before = csv.field_size_limit()
    read_csv(write(tmp_path / "a.csv", ROWS), "text", "label")
    assert csv.field_size_limit() >= before


@pytest.mark.parametrize("header", ["text,label,label", "text,text,label", "text,label, label"])
def test_a_column_twice_is_refused_and_another_is_not(header, tmp_path):
    rows = [(*row, "x") for row in ROWS]
    with pytest.raises(DataError, match="twice"):
        read_csv(write(tmp_path / "a.csv", rows, header), "text", "label")
    other = write(tmp_path / "b.csv", [(*row, "x", "y") for row in ROWS], "text,label,note,note")
    assert read_csv(other, "text", "label") == ROWS


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_cells_may_be_separated_as_spreadsheets_write_them(separator, tmp_path):
    file = write(tmp_path / "a.csv", ROWS, f"text{separator}label", separator)
    assert read_csv(file, "text", "label") == ROWS


# ------------------------------------------------------------------------ encodings


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_says_what_a_file_is_in(encoding, tmp_path):
    rows = [("très bon", "pos"), ("mauvais", "neg")]
    assert read_csv(write(tmp_path / "a.csv", rows, encoding=encoding), "text", "label") == rows
    (tmp_path / "a.txt").write_text("images/é 1.png 0\n", encoding=encoding)
    assert read_list(tmp_path / "a.txt") == [(tmp_path / "images/é 1.png", 0)]
    assert read_lines(tmp_path / "a.txt") == ["images/é 1.png 0"]


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "utf-16-le"])
def test_another_encoding_is_refused_with_its_name_and_the_line(encoding, tmp_path):
    file = write(tmp_path / "a.csv", [("bon", "pos"), ("très bon", "pos")], encoding=encoding)
    expected = "UTF-16" if encoding == "utf-16-le" else r"line 3[\s\S]*'è'[\s\S]*Windows-1252"
    with pytest.raises(DataError, match=rf"{expected}[\s\S]*iconv|lacks a column"):
        read_csv(file, "text", "label")


# ------------------------------------------------------------------------ line ends and blanks


@pytest.mark.parametrize(
    "letter", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"]
)
def test_only_line_ends_end_a_line(letter, language, tmp_path):
    text = f"good{letter}film"
    assert split_lines(f"{text}\n{text}\r\n{text}\r\n") == [text] * 3
    (tmp_path / "a.txt").write_text(f"{text}\nbad film\n", newline="")
    assert read_lines(tmp_path / "a.txt") == [text, "bad film"]
    assert read_csv(write(tmp_path / "a.csv", [(text, "pos")]), "text", "label") == [(text, "pos")]
    (tmp_path / "l.txt").write_text(f"images/{text}.png 1\n", newline="")
    assert read_list(tmp_path / "l.txt") == [(tmp_path / f"images/{text}.png", 1)]
    (tmp_path / "t.conll").write_text(f"{text} A\nfilm B\n\n" * 4, newline="")
    words, _ = load_data(str(tmp_path / "t.conll"), language).train[0]
    assert words == [text, "film"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_of_every_system_are_read(end, tmp_path):
    assert read_csv(write(tmp_path / "a.csv", ROWS, end=end), "text", "label") == ROWS


@pytest.mark.parametrize(
    ("line", "word"), [("10\u00a0000 O", "10\u00a0000"), ("New York\tO", "New York")]
)
def test_a_word_keeps_the_blanks_that_are_no_separators(line, word, language, tmp_path):
    (tmp_path / "t.conll").write_text(f"{line}\nfilm B\n\n" * 4)
    words, _ = load_data(str(tmp_path / "t.conll"), language).train[0]
    assert words == [word, "film"]


def test_blanks_around_labels_make_no_class_and_joining_two_is_said(language, tmp_path):
    rows = [*ROWS, ("good", "pos "), ("bad", "\u00a0neg")]
    with pytest.warns(RestuningWarning, match="'pos'.*'pos '"):
        data = load_data(str(write(tmp_path / "a.csv", rows)), language)
    assert data.labels == ["neg", "pos"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        padded = [(t, f" {y}") for t, y in ROWS]
        assert load_data(str(write(tmp_path / "b.csv", padded)), language).labels == ["neg", "pos"]


# ------------------------------------------------------------------------ splits


@pytest.mark.parametrize("names", [("Training", "dev", "TEST"), ("train", "Valid", "testing")])
@pytest.mark.parametrize("end", ["csv", "CSV", "conll"])
def test_splits_have_any_of_their_usual_names_in_any_case(names, end, language, tmp_path):
    for name in names:
        if end == "conll":
            (tmp_path / f"{name}.conll").write_text("good A\nfilm B\n\n" * 3)
        else:
            write(tmp_path / f"{name}.{end}", ROWS)
    data = load_data(str(tmp_path), language)
    assert None not in (data.train, data.val, data.test)


def test_two_files_of_one_split_and_none_for_training_are_refused(language, tmp_path):
    write(tmp_path / "valid.csv", ROWS)
    with pytest.raises(DataError, match="none for training"):
        load_data(str(tmp_path), language)
    write(tmp_path / "train.csv", ROWS)
    write(tmp_path / "dev.csv", ROWS)
    with pytest.raises(DataError, match="two names for the val split"):
        load_data(str(tmp_path), language)


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("end", ["csv", "conll"])
def test_a_split_without_rows_is_refused_before_anything_is_trained(split, end, language, tmp_path):
    empty, full = {
        "csv": ("text,label\n", "text,label\ngood,pos\nbad,neg\n"),
        "conll": ("\n\n", "good A\nfilm B\n\n"),
    }[end]
    for name in ("train", "val", "test"):
        (tmp_path / f"{name}.{end}").write_text(empty if name == split else full)
    with pytest.raises(DataError, match=rf"no rows[\s\S]*{split}.{end}"):
        load_data(str(tmp_path), language)


@pytest.mark.parametrize("classes", ['"ab"', '{"a": 1}', "3"])
def test_class_names_that_are_no_list_are_refused(classes, tmp_path):
    (tmp_path / "train800.txt").write_text("images/0.png 0\nimages/1.png 1\n")
    (tmp_path / "task.json").write_text(f'{{"classes": {classes}}}')
    from restuning import load_backbone

    with pytest.raises(DataError, match="malformed"):
        load_data(str(tmp_path), load_backbone("restuning-tiny"))


# ------------------------------------------------------------------------ what is likely no data


@pytest.mark.parametrize("line", ["# a comment\n", "New York B\n", "# id = 1\n", "a b\tc\tB\n"])
def test_a_line_with_other_columns_than_the_first_makes_no_tag(line, language, tmp_path):
    (tmp_path / "a.conll").write_text(f"film A\n{line}\nbad B\n\n" * 4)
    with pytest.raises(DataError, match=r"other columns than the first.*line 2"):
        load_data(str(tmp_path / "a.conll"), language)


def test_empty_cells_and_tabs_in_a_row_are_no_other_columns(language, tmp_path):
    (tmp_path / "a.conll").write_text("film\tN\tA\ngood\t\tB\n\n" * 4)
    assert load_data(str(tmp_path / "a.conll"), language).train[0][0] == ["film", "good"]
    (tmp_path / "b.conll").write_text("film\tA\ngood\t\tB\n\n" * 4)
    assert load_data(str(tmp_path / "b.conll"), language).train[0][0] == ["film", "good"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("text,label\na,b\n".encode("utf-16-le"), "iconv -f UTF-16LE"),
        ("text,label\na,b\n".encode("utf-16-be"), "iconv -f UTF-16BE"),
        (b"PK\3\4 and more", "a zip file"),
        (b"\x1f\x8b and more", "a gzip file"),
    ],
)
def test_a_file_of_another_kind_is_refused_by_what_it_is(content, words, tmp_path):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_csv(tmp_path / "a.csv", "text", "label")


@pytest.mark.parametrize(
    "other", ["Pos", "pos\u200b", "p\u00f3s", "\uff50os"], ids=["case", "unseen", "accent", "wide"]
)
def test_labels_that_look_alike_are_warned_of(other, language, tmp_path):
    first = "po\u0301s" if other == "p\u00f3s" else "pos"
    rows = [("good", first), ("bad", "neg"), ("fine", other)] * 4
    with pytest.warns(RestuningWarning, match="look alike"):
        data = load_data(str(write(tmp_path / "a.csv", rows)), language)
    assert set(data.labels) == {first, "neg", other}


def test_a_split_that_is_left_without_a_row_is_absent(language, tmp_path):
    rows = [("a film", str(y)) for y in range(3) for _ in range(3)]
    data = load_data(str(write(tmp_path / "a.csv", rows)), language)
    assert data.test is None
    assert "0 test" not in data.describe()
