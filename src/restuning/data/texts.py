"""Texts and labels from csv files, and tagged words from CoNLL files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from restuning._errors import DataError
from restuning.data.data import SPLIT_SEED, Data, DataOptions, name_of, split_by_class
from restuning.data.labels import trim_labels
from restuning.data.splits import find_splits
from restuning.data.text_files import read_csv, read_text, split_lines
from restuning.data.tokens import TagBatch, TextBatch
from restuning.problems import Tokens

if TYPE_CHECKING:
    from restuning.backbones import Backbone

PARTS = ("train", "val", "test")
TABLES = (".csv", ".tsv")
PARQUET = (".parquet",)
TAGGED = (".conll", ".iob", ".iob2")
"""Suffixes, in small letters."""


def find_files(path: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """The files of a text data set by split, a single file as "whole"; empty if it is none of this kind.

    Raises:
        DataError: Two files are the same split, or none is for training.
    """
    if not path.is_dir():
        return {"whole": path} if path.suffix.lower() in suffixes else {}
    files = [p.name for p in path.iterdir() if p.suffix.lower() in suffixes]
    found = find_splits(files, str(path), suffixes)
    if found and "train" not in found:
        raise DataError(
            "files for validation or testing, and none for training",
            where=str(path),
            found=", ".join(found.values()),
            fix=f"add train{suffixes[0]}",
        )
    return {split: path / name for split, name in found.items()}


def from_csv(path: Path, files: dict[str, Path], backbone: Backbone, options: DataOptions) -> Data:
    """A csv file, or those of a folder, as `find_files` found them."""
    collate = TextBatch(require_tokenizer(path, backbone), options.max_tokens)
    rows = {k: read_csv(file, options.text, str(options.label)) for k, file in files.items()}
    refuse_empty(files, rows)
    trimmed = iter(trim_labels([y for pairs in rows.values() for _, y in pairs], str(path)))
    rows = {k: [(text, next(trimmed)) for text, _ in pairs] for k, pairs in rows.items()}
    if "whole" in rows:
        whole = rows["whole"]
        known = sorted({y for _, y in whole})
        parts = split_by_class([known.index(y) for _, y in whole], (0.7, 0.1), SPLIT_SEED)
        rows = {k: [whole[i] for i in p] for k, p in zip(PARTS, parts, strict=True)}
    # Short ones first, so that 2 stands before 10.
    labels = sorted({y for _, y in rows["train"]}, key=lambda y: (len(y), y))
    _check_classes(path, labels, {k: {y for _, y in pairs} for k, pairs in rows.items()})
    places = {y: i for i, y in enumerate(labels)}
    splits = {k: [(t, places[y]) for t, y in pairs] for k, pairs in rows.items()}
    return _build_data(path, splits, labels, collate, options.final)


def from_conll(
    path: Path, files: dict[str, Path], backbone: Backbone, options: DataOptions
) -> Data:
    """Tagged words: a file, or those of a folder, as `find_files` found them.

    A word a line, its tag in the last column; an empty line ends a sentence. Columns are separated
    by tabs in a line that has one, else by spaces.
    """
    collate = TagBatch(require_tokenizer(path, backbone), options.max_tokens)
    rows = {k: _read_sentences(file) for k, file in files.items()}
    refuse_empty(files, rows)
    if "whole" in rows:
        whole = rows["whole"]
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


def refuse_empty(files: dict[str, Path], rows: Mapping[str, Sequence[Any]]) -> None:
    """Refuse a split whose file holds no row.

    Raises:
        DataError: One does.
    """
    for split, file in files.items():
        if not rows[split]:
            raise DataError(
                "a file of a data set has no rows",
                where=str(file),
                found="a header at most",
                fix="fill it, or remove the file",
            )


def _read_sentences(file: Path) -> list[tuple[list[str], list[str]]]:
    sentences: list[tuple[list[str], list[str]]] = [([], [])]
    first: list[str] = []
    for number, line in enumerate(split_lines(read_text(file)), 1):
        # CoNLL 2003 marks where a document begins.
        if line.startswith("-DOCSTART-"):
            continue
        cells = _split_columns(line)
        columns = [c for c in cells if c]
        first = first or cells
        if not columns:
            sentences.append(([], []))
        elif len(columns) < 2:
            raise DataError(
                "a word has no tag",
                where=f"{file}, line {number}",
                found=line[:60],
                fix="write a word and its tag on every line",
            )
        elif len(cells) != len(first) and len(columns) != len([c for c in first if c]):
            # A comment, or a word with a blank in it: its last part would be the tag of its first.
            raise DataError(
                "a line has other columns than the first",
                where=f"{file}, line {number}",
                found=f"{len(columns)} columns, {len(first)} in the first line: {line[:60]}",
                fix="write as many on every line, with tabs between them if words hold blanks, and take "
                "comments out",
            )
        else:
            sentences[-1][0].append(columns[0])
            sentences[-1][1].append(columns[-1])
    return [s for s in sentences if s[0]]


def _split_columns(line: str) -> list[str]:
    """Columns by tabs or spaces and nothing else: words hold other blanks (10 000), and between tabs spaces."""
    line = line.strip(" \t")
    columns = [c.strip(" ") for c in line.split("\t")] if "\t" in line else re.split(" +", line)
    return columns if any(columns) else []


def require_tokenizer(path: str | Path, backbone: Backbone) -> Any:
    """The tokenizer of a language backbone.

    Raises:
        DataError: It is none.
    """
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
        name_of(path),
        train,
        # Of few rows none may be left for them.
        None if final else splits.get("val") or None,
        splits.get("test") or None,
        labels,
        collate.kind,
        collate,
        notes={"preprocessing": collate.to_dict()},
        problem=Tokens() if collate.kind == "tags" else None,
    )
