"""Texts and labels from csv files."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

from restuning._errors import DataError
from restuning.data.data import SPLIT_SEED, Data, identity, stratified, text_batch

if TYPE_CHECKING:
    from restuning.backbones import Backbone


def _csv_rows(file: Path, text: str, label: str) -> list[tuple[str, str]]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            columns = reader.fieldnames or []
            if text not in columns or label not in columns:
                raise DataError(
                    "a csv lacks a column", where=str(file), found=f"columns {list(columns)[:8]}",
                    fix="name them with --text and --label",
                )  # fmt: skip
            rows = []
            for row in reader:
                if not (row[label] or "").strip():
                    raise DataError(
                        "a text has no label", where=f"{file}, line {reader.line_num}",
                        found=(row[text] or "")[:60], fix="give it one, or remove the line",
                    )  # fmt: skip
                rows.append((row[text] or "", row[label]))
            return rows
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            "a csv cannot be read", where=str(file), found=str(error)[:200], fix="restore it"
        ) from None


def from_csv(path: Path, backbone: Backbone, text: str, label: str, final: bool) -> Data:
    """A csv file, or a folder with train.csv and optionally val.csv and test.csv."""
    if backbone.tokenizer is None:
        raise DataError(
            "text needs a language backbone", where=str(path), found=f"backbone {backbone.name}",
            fix="give one, e.g. --backbone hf:sentence-transformers/all-MiniLM-L6-v2",
        )  # fmt: skip
    if path.is_dir():
        files = {k: path / f"{k}.csv" for k in ("train", "val", "test")}
        rows = {k: _csv_rows(f, text, label) for k, f in files.items() if f.exists()}
    else:
        whole = _csv_rows(path, text, label)
        known = sorted({y for _, y in whole})
        parts = stratified([known.index(y) for _, y in whole], (0.7, 0.1), SPLIT_SEED)
        rows = {
            k: [whole[i] for i in p] for k, p in zip(("train", "val", "test"), parts, strict=True)
        }
    labels = sorted({y for _, y in rows["train"]}, key=lambda y: (len(y), y))
    if len(labels) < 2:
        raise DataError("a classification needs two classes", where=str(path),
                        found=f"{len(labels)}", fix="check the label column")  # fmt: skip
    splits: dict[str, Any] = {}
    for key, pairs in rows.items():
        unknown = {y for _, y in pairs} - set(labels)
        if unknown:
            raise DataError("classes that training does not have", where=f"{path} ({key})",
                            found=", ".join(sorted(unknown)[:5]), fix="correct the label column")  # fmt: skip
        splits[key] = [(t, labels.index(y)) for t, y in pairs]
    train = splits["train"] + (splits.get("val", []) if final else [])
    return Data(
        path.stem, train, None if final else splits.get("val"), splits.get("test"), labels, "text",
        text_batch(backbone.tokenizer), identity=identity([p for s in splits.values() for p in s]),
    )  # fmt: skip
