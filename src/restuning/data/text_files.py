"""Files of text as people have them: their encoding, where a line ends, rows of a csv."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from restuning._errors import DataError

_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    # Before UTF-16, whose mark is the beginning of this one.
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Byte order marks, and the encoding that each is proof of."""

_PACKED = {
    b"PK\x03\x04": "a zip file, as spreadsheets are (.xlsx, .ods)",
    b"\x1f\x8b": "a gzip file",
    b"\xd0\xcf\x11\xe0": "an old spreadsheet (.xls)",
}
"""What is given for a file of text by mistake, by how it begins."""

SEPARATORS = (",", ";", "\t")
"""Of a csv: Excel writes semicolons where the comma is the decimal point."""

LONGEST_CELL = 2**31 - 1
"""Characters: the largest limit that Python's csv reader takes on every system."""


def read_text(file: Path) -> str:
    """The text of a file, in UTF-8 or in the encoding that its byte order mark names.

    Raises:
        DataError: It cannot be read, or is in another encoding: that is not guessed.
    """
    try:
        if file.exists() and not file.is_file():
            # A pipe would be waited for without end.
            raise OSError("not a regular file")
        content = file.read_bytes()
    except OSError as error:
        raise DataError(
            "a file of text cannot be read",
            where=str(file),
            found=error.strerror or str(error),
            fix="check the path",
        ) from None
    return decode_text(content, file)


def decode_text(content: bytes, file: Path) -> str:
    """Bytes as text, as `read_text` reads them; `file` is what an error calls them.

    Raises:
        DataError: They are in another encoding: that is not guessed.
    """
    encoding = next((e for mark, e in _MARKS.items() if content.startswith(mark)), "utf-8")
    packed = next((kind for mark, kind in _PACKED.items() if content.startswith(mark)), "")
    if packed:
        raise DataError(
            "a file of text is none",
            where=str(file),
            found=packed,
            fix="unpack it; of a spreadsheet save the sheet as CSV in UTF-8",
        )
    if encoding == "utf-8" and _is_wide(content):
        # Zeros are letters of UTF-8, too.
        raise _describe_encoding(file, content, encoding, 0)
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise _describe_encoding(file, content, encoding, error.start) from None


def _describe_encoding(file: Path, content: bytes, encoding: str, start: int) -> DataError:
    """What stands at the first byte that is not in the encoding, and how to convert the file."""
    if encoding != "utf-8":
        return DataError(
            "a file of text is damaged",
            where=str(file),
            found=f"it is marked as {encoding.upper()}, and byte {start} is not",
            fix="restore it, or save it as UTF-8",
        )
    if _is_wide(content):
        likely = "UTF-16BE" if content[:1] == b"\0" else "UTF-16LE"
        shown = "every other byte is zero, as in UTF-16"
    else:
        likely = "WINDOWS-1252"
        letter = content[start : start + 1].decode("cp1252", "replace")
        line = content.count(b"\n", 0, start) + 1
        shown = f"byte {content[start]:#04x} in line {line}, which is {letter!r} in Windows-1252"
    return DataError(
        "a file of text is not UTF-8",
        where=str(file),
        found=shown,
        fix='save it as UTF-8 (Excel: "CSV UTF-8"), or convert it: '
        f"iconv -f {likely} -t UTF-8 {file.name} > utf8-{file.name}",
    )


def _is_wide(content: bytes) -> bool:
    return content.count(0) > len(content) // 4


def split_lines(text: str) -> list[str]:
    """Lines without their ends, which are the ends that files have and no other character.

    `str.splitlines` ends a line at U+2028, U+0085, form feeds and more, which stand inside of texts.
    """
    lines = re.split("\r\n|\n|\r", text)
    # What ends with a line end has no empty line after it.
    return lines[:-1] if lines[-1] == "" else lines


def read_lines(file: Path) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        DataError: It cannot be read.
    """
    return [line for _, line in read_numbered_lines(file)]


def read_numbered_lines(file: Path) -> list[tuple[int, str]]:
    """Likewise, each with its number in the file, from 1: empty lines count.

    Raises:
        DataError: It cannot be read.
    """
    return [(n, line) for n, line in enumerate(split_lines(read_text(file)), 1) if line.strip()]


def read_csv(file: Path, text: str, label: str | None) -> list[tuple[str, str]]:
    """Texts and labels of a csv with a header; labels are "" if no label column is asked for.

    Cells are separated by commas, or by semicolons or tabs where the header says so.

    Raises:
        DataError: Unreadable, without the columns or with one of them twice, a row has more or
            fewer cells than there are columns, or a label is missing.
    """
    rows: list[tuple[str, str]] = []
    for line, cells in read_cells(file, [c for c in (text, label) if c is not None]):
        answer = "" if label is None else cells[label]
        if label is not None and not answer.strip():
            raise DataError(
                "a text has no label",
                where=f"{file}, line {line}",
                found=cells[text][:60],
                fix="give it one, or remove the line",
            )
        rows.append((cells[text], answer))
    return rows


def read_cells(file: Path, wanted: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """The number of the line that each row of a csv begins in, and its cells by column.

    Args:
        file: With a header.
        wanted: Columns that must be there, each once.

    Raises:
        DataError: As `read_csv`, but that no cell is asked for.
    """
    content = read_text(file)
    header, separator = _read_header(file, content, list(wanted))
    places = [header.index(name) for name in wanted]
    reader = _open_reader(content, separator)
    line = 1
    try:
        next(reader)
        # A row begins in the line after the one that the row before ended in.
        line = reader.line_num + 1
        for row in reader:
            # Blank lines are no rows.
            if len(row) > 1 or (row and row[0].strip()):
                _check_row(file, line, row, header)
                yield line, {name: row[at] for name, at in zip(wanted, places, strict=True)}
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            "a row of a csv cannot be read",
            where=f"{file}, line {line}",
            found=str(error)[:200],
            fix='write a quote inside of a quoted cell twice (""), and close every quote',
        ) from None


def writes_decimal_commas(file: Path, wanted: Sequence[str]) -> bool:
    """Whether cells are separated by semicolons, as Excel does where the comma is the decimal point.

    Raises:
        DataError: As `read_cells`.
    """
    return _read_header(file, read_text(file), list(wanted))[1] == ";"


def list_columns(file: Path) -> list[str]:
    """The names of the columns of a csv, as far as its header says them.

    Raises:
        DataError: It cannot be read.
    """
    return _read_header(file, read_text(file), [])[0]


def _open_reader(content: str, separator: str):  # noqa: ANN202 (csv names no type of its readers)
    # One limit for the whole process, so it is raised and never lowered: others may be reading.
    csv.field_size_limit(max(csv.field_size_limit(), min(len(content) + 1, LONGEST_CELL)))
    # Strict: an unclosed quote would else swallow all rows after it without a word.
    return csv.reader(io.StringIO(content, newline=""), delimiter=separator, strict=True)


def _read_header(file: Path, content: str, wanted: list[str]) -> tuple[list[str], str]:
    """The names of the columns, and what separates them."""
    headers: dict[str, list[str]] = {}
    for separator in SEPARATORS:
        try:
            row = next(_open_reader(content, separator), [])
        except csv.Error:
            continue
        headers[separator] = [cell.strip() for cell in row]
    fits = [s for s, header in headers.items() if all(w in header for w in wanted)]
    if not wanted:
        # Nothing says which of them it is but how many columns each makes.
        fits = sorted(headers, key=lambda s: -len(headers[s]))
    if not fits:
        columns = max(headers.values(), key=len, default=[])
        raise DataError(
            "a csv lacks a column",
            where=str(file),
            found=f"columns {columns[:8]}, wanted {' and '.join(map(repr, wanted))}",
            fix="name them with --text and --label" if len(wanted) > 1 else "name it with --text",
        )
    header = headers[fits[0]]
    twice = [name for name in wanted if header.count(name) > 1]
    if twice:
        raise DataError(
            "a csv has a column twice",
            where=str(file),
            found=f"{twice[0]!r} in columns {[i for i, n in enumerate(header, 1) if n == twice[0]]}",
            fix="rename or remove one of them",
        )
    return header, fits[0]


def _check_row(file: Path, line: int, row: list[str], header: list[str]) -> None:
    if len(row) == len(header):
        return
    more = len(row) > len(header)
    raise DataError(
        f"a row of a csv has {'more' if more else 'fewer'} cells than there are columns",
        where=f"{file}, line {line}",
        found=f"{len(row)} cells, {len(header)} columns: {','.join(row)[:80]}",
        fix='put a text that holds the separator in quotes ("bad, really bad",neg)'
        if more
        else "write every cell, also an empty one",
    )
