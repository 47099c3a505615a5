"""Inputs of a split as a person is shown them: the image or the text behind an example, and its name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch.utils.data import ConcatDataset, Subset

from restuning.data.data import ImageDataset
from restuning.data.identity import list_files, list_ids


def find_shown(split: Any, row: int) -> Image.Image | str | None:
    """The image of a row, before any transform, or its text; None of data sets that say neither.

    Raises:
        DataError: The image cannot be read.
    """
    if isinstance(split, Subset):
        return find_shown(split.dataset, int(split.indices[row]))
    if isinstance(split, ConcatDataset):
        for part in split.datasets:
            if row < len(part):  # type: ignore[arg-type]
                return find_shown(part, row)
            row -= len(part)  # type: ignore[arg-type]
        return None
    if isinstance(split, ImageDataset):
        return split.image(row)
    # Only what is a list: another data set may open a file, or draw.
    given = split[row][0] if isinstance(split, (list, tuple)) else None
    return given if isinstance(given, str) else None


def list_names(split: Any, words: int | None = None) -> list[str]:
    """What each example is called: its file, its text, or its number; of tagged texts each word.

    Args:
        split: Map-style data set.
        words: How many words were answered, where each has an answer of its own. Of texts that were cut they are
            fewer than are written there, and numbers are all that is told.
    """
    if words is not None and words != len(split):
        sentences = split if isinstance(split, (list, tuple)) else ()
        told = [word for sentence, _ in sentences for word in _words_of(sentence)]
        return told if len(told) == words else [str(n) for n in range(words)]
    files = list_files(split)
    if files is not None:
        return [str(file) for file in files]
    if (ids := list_ids(split)) is not None:
        return ids
    shown = [split[n][0] if isinstance(split, (list, tuple)) else None for n in range(len(split))]
    return [each if isinstance(each, str) else str(n) for n, each in enumerate(shown)]


def _words_of(sentence: Any) -> Sequence[str]:
    return sentence if isinstance(sentence, (list, tuple)) else []
