"""What a user names on the command line, as batches for a backbone."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from restuning._errors import DataError
from restuning.backbones import Preprocessing
from restuning.data import TagBatch, TextBatch, decode, read_csv
from restuning.data.texts import read_lines

LONGEST_CELL = 60
"""Characters of a text up to which a table makes room for it."""


@dataclass(frozen=True)
class Batch:
    """Inputs that belong together.

    Attributes:
        names: One each.
        args, kwargs: The backbone's.
        words: For every text the token that answers for each word; None where a text has one answer.
    """

    names: list[Any]
    args: tuple[Tensor, ...] = ()
    kwargs: dict[str, Tensor] = field(default_factory=dict)
    words: list[dict[int, int]] | None = None


class Inputs(Protocol):
    """One kind of input."""

    kind: str
    skipped: list[Path]

    def named(self, given: Sequence[str]) -> list[Any]:
        """Every single input behind what the user gave."""
        ...

    def width(self, name: Any) -> int:
        """Characters it takes in a table."""
        ...

    def batch(self, names: Sequence[Any]) -> Batch:
        """Some of them, ready."""
        ...


class Images:
    """Image files and folders of them."""

    kind = "image"

    def __init__(self, preprocessing: Preprocessing, skip_bad: bool) -> None:
        self.preprocessing, self.skip_bad = preprocessing, skip_bad
        self.skipped: list[Path] = []

    def named(self, given: Sequence[str]) -> list[str]:
        """All files."""
        files: list[Path] = []
        for path in map(Path, given):
            files += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        return list(map(str, files))

    def width(self, name: str) -> int:
        """Of a path."""
        return len(name)

    def batch(self, names: Sequence[str]) -> Batch:
        """Decoded and prepared; corrupt files raise, or are left out and counted."""
        kept, tensors = [], []
        for name in names:
            try:
                tensors.append(self.preprocessing.image(decode(Path(name))))
                kept.append(name)
            except DataError:
                if not self.skip_bad:
                    raise
                self.skipped.append(Path(name))
        return Batch(kept, (torch.stack(tensors),) if tensors else ())


class Texts:
    """Texts as they stand, `-` for lines of the standard input, .csv and .txt files."""

    kind = "text"

    def __init__(self, collate: TextBatch, column: str) -> None:
        self.collate, self.column = collate, column
        self.skipped: list[Path] = []
        self.lines: list[str] | None = None

    def named(self, given: Sequence[str]) -> list[Any]:
        """All texts; the standard input is read once.

        Raises:
            DataError: A .csv or .txt file is not there or cannot be read.
        """
        texts: list[str] = []
        for each in given:
            if each == "-":
                self.lines = self.lines or [line.rstrip("\n") for line in sys.stdin]
                texts += self.lines
            elif each.endswith(".csv"):
                texts += [text for text, _ in read_csv(Path(each), self.column, None)]
            elif each.endswith(".txt"):
                texts += read_lines(Path(each))
            else:
                texts.append(each)
        return texts

    def width(self, name: Any) -> int:
        """Of a text; long ones run over."""
        return min(len(name), LONGEST_CELL)

    def batch(self, names: Sequence[Any]) -> Batch:
        """Tokens of some texts."""
        return Batch(list(names), kwargs=dict(self.collate.tokens(names)))


class Sentences(Texts):
    """Texts whose words, apart at white space, are each answered."""

    kind = "words"

    def named(self, given: Sequence[str]) -> list[Any]:
        """All sentences, as lists of words."""
        return [words for text in super().named(given) if (words := text.split())]

    def width(self, name: Any) -> int:
        """Of the longest word."""
        return max(map(len, name))

    def batch(self, names: Sequence[Any]) -> Batch:
        """Tokens of some sentences."""
        assert isinstance(self.collate, TagBatch)
        tokens, places = self.collate.place_words(names)
        return Batch(list(names), kwargs=tokens, words=places)
