"""Texts and labels from csv files, and tagged words from CoNLL files."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

from restuning._errors import DataError
from restuning.data.data import SPLIT_SEED, Data, DataOptions, hash_samples, split_by_class
from restuning.data.tokens import TagBatch, TextBatch

if TYPE_CHECKING:
    from restuning.backbones import Backbone

PARTS = ("train", "val", "test")
TAGGED = (".conll", ".iob", ".iob2")


def read_csv(file: Path, text: str, label: str | None) -> list[tuple[str, str]]:
    """Texts and labels of a csv with a header; labels are "" if no label column is asked for.

    Raises:
        DataError: Unreadable, or without the columns, or a label is missing.
    """
    try:
        # Excel writes a byte order mark, which would be a part of the first column's name.
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            columns = reader.fieldnames or []
            if text not in columns or (label is not None and label not in columns):
                raise DataError(
                    "a csv lacks a column",
                    where=str(file),
                    found=f"columns {list(columns)[:8]}",
                    fix="name them with --text and --label" if label else "name it with --text",
                )
            rows = []
            for row in reader:
                if label is not None and not (row[label] or "").strip():
                    raise DataError(
                        "a text has no label",
                        where=f"{file}, line {reader.line_num}",
                        found=(row[text] or "")[:60],
                        fix="give it one, or remove the line",
                    )
                rows.append((row[text] or "", row[label] if label is not None else ""))
            return rows
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            "a csv cannot be read", where=str(file), found=str(error)[:200], fix="restore it"
        ) from None


def from_csv(path: Path, backbone: Backbone, options: DataOptions) -> Data:
    """A csv file, or a folder with train.csv and optionally val.csv and test.csv."""
    collate = TextBatch(_require_tokenizer(path, backbone), options.max_tokens)
    text, label = options.text, options.label
    if path.is_dir():
        files = {k: path / f"{k}.csv" for k in PARTS}
        rows = {k: read_csv(f, text, label) for k, f in files.items() if f.exists()}
    else:
        whole = read_csv(path, text, label)
        known = sorted({y for _, y in whole})
        parts = split_by_class([known.index(y) for _, y in whole], (0.7, 0.1), SPLIT_SEED)
        rows = {k: [whole[i] for i in p] for k, p in zip(PARTS, parts, strict=True)}
    # Short ones first, so that 2 stands before 10.
    labels = sorted({y for _, y in rows["train"]}, key=lambda y: (len(y), y))
    _check_classes(path, labels, {k: {y for _, y in pairs} for k, pairs in rows.items()})
    splits = {k: [(t, labels.index(y)) for t, y in pairs] for k, pairs in rows.items()}
    return _build_data(path, splits, labels, collate, options.final)


def from_conll(path: Path, backbone: Backbone, options: DataOptions) -> Data:
    """Tagged words: a file, or a folder with train.conll and optionally val.conll and test.conll.

    A word a line, its tag in the last column; an empty line ends a sentence.
    """
    collate = TagBatch(_require_tokenizer(path, backbone), options.max_tokens)
    if path.is_dir():
        files = {k: path / f"{k}{e}" for k in PARTS for e in TAGGED if (path / f"{k}{e}").exists()}
        rows = {k: _read_sentences(file) for k, file in files.items()}
    else:
        whole = _read_sentences(path)
        # Sentences hold several classes each, so there is nothing to divide evenly.
        parts = split_by_class([0] * len(whole), (0.7, 0.1), SPLIT_SEED)
        rows = {k: [whole[i] for i in p] for k, p in zip(PARTS, parts, strict=True)}
    used = {k: {tag for _, tags in sentences for tag in tags} for k, sentences in rows.items()}
    # O, for words outside of all names, is class 0 by custom.
    labels = sorted(used["train"], key=lambda y: (y != "O", y))
    _check_classes(path, labels, used)
    places = {tag: i for i, tag in enumerate(labels)}
    splits = {
        k: [(words, [places[t] for t in tags]) for words, tags in sentences]
        for k, sentences in rows.items()
    }
    return _build_data(path, splits, labels, collate, options.final)


def _read_sentences(file: Path) -> list[tuple[list[str], list[str]]]:
    sentences: list[tuple[list[str], list[str]]] = [([], [])]
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            "a file of tagged words cannot be read",
            where=str(file),
            found=str(error)[:200],
            fix="restore it",
        ) from None
    for number, line in enumerate(lines, 1):
        # CoNLL 2003 marks where a document begins.
        if line.startswith("-DOCSTART-"):
            continue
        columns = line.split()
        if not columns:
            sentences.append(([], []))
        elif len(columns) < 2:
            raise DataError(
                "a word has no tag",
                where=f"{file}, line {number}",
                found=line[:60],
                fix="write a word and its tag on every line",
            )
        else:
            sentences[-1][0].append(columns[0])
            sentences[-1][1].append(columns[-1])
    return [s for s in sentences if s[0]]


def _require_tokenizer(path: Path, backbone: Backbone) -> Any:
    if backbone.tokenizer is None:
        raise DataError(
            "text needs a language backbone",
            where=str(path),
            found=f"backbone {backbone.name}",
            fix="give one, e.g. --backbone hf:sentence-transformers/all-MiniLM-L6-v2",
        )
    return backbone.tokenizer


def _check_classes(path: Path, labels: list[str], used: dict[str, set[str]]) -> None:
    if len(labels) < 2:
        raise DataError(
            "a classification needs two classes",
            where=str(path),
            found=f"{len(labels)}",
            fix="check the label column",
        )
    for part, classes in used.items():
        unknown = classes - set(labels)
        if unknown:
            raise DataError(
                "classes that training does not have",
                where=f"{path} ({part})",
                found=", ".join(sorted(unknown)[:5]),
                fix="correct the label column",
            )


def _build_data(
    path: Path, splits: dict[str, list[Any]], labels: list[str], collate: TextBatch, final: bool
) -> Data:
    train = splits["train"] + (splits.get("val", []) if final else [])
    return Data(
        path.stem,
        train,
        None if final else splits.get("val"),
        splits.get("test"),
        labels,
        collate.kind,
        collate,
        identity=hash_samples([p for s in splits.values() for p in s]),
        notes={"preprocessing": collate.to_dict()},
    )


def read_lines(file: Path) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        DataError: It cannot be read.
    """
    try:
        return [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            "a file of texts cannot be read",
            where=str(file),
            found=str(error)[:200],
            fix="give a file with a text a line",
        ) from None
