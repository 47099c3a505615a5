"""Labelled examples without splits: all that a folder or a table holds, to be added to a task or taken out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from restuning._errors import DataError
from restuning._files import expand_home
from restuning.data.data import Data, DataOptions
from restuning.data.folders import LISTS, list_classes
from restuning.data.identity import find_samples
from restuning.data.labels import trim_labels
from restuning.data.listing import CORRUPT, LeftOut, merge_left_out
from restuning.data.load import load_data
from restuning.data.media import (
    IMAGES,
    describe_inputs,
    drop_corrupt,
    media_of,
    open_files,
    refuse_mixed,
)
from restuning.data.splits import find_splits
from restuning.data.tables import find_table, load_rows
from restuning.data.targets import list_targets
from restuning.data.text_files import read_csv
from restuning.data.texts import TABLES, TAGGED, find_files, require_tokenizer
from restuning.data.tokens import TextBatch

if TYPE_CHECKING:
    from restuning.backbones import Backbone


@dataclass(frozen=True)
class Labelled:
    """Examples and the names of their classes.

    Attributes:
        examples: Map-style data set of `(input, label)`.
        names: Of the classes, by label.
        labels: One an example.
        inputs: Digests of the examples' contents, 32 bytes each.
        shown: What an example is called in a message.
        collate: Samples to a batch; None for torch's default.
        left_out: Names of what was passed over, by reason.
        notes: As of `Data`.
    """

    examples: Any
    names: list[str]
    labels: list[int]
    inputs: Sequence[bytes]
    shown: Callable[[int], str]
    collate: Callable[[Sequence[Any]], Any] | None = None
    left_out: dict[str, list[str]] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)


def load_labelled(
    name: str | Data, backbone: Backbone, options: DataOptions | None = None
) -> Labelled:
    """Every example of a folder of class folders, which may be a single one, or of a csv file.

    Of data that have splits (folders train, val and test, or lists; `digits`, `hf:NAME` ...) the training split.

    Args:
        name: As `load_data` takes it, or a data set that is loaded.
        backbone: Whose preprocessing or tokenizer is used.
        options: How it is read.

    Raises:
        DataError: Missing or malformed data, tagged words, or examples that are not known by their contents.
    """
    options = options or DataOptions()
    if isinstance(name, Data):
        return _from_data(name)
    path = expand_home(name)
    if find_files(path, TAGGED):
        raise _tags(name)
    files = find_files(path, TABLES)
    if find_table(path, backbone, options) and path.is_file():
        data, shown = load_rows(path, backbone, options)
        return _known(data.train, list(data.labels), shown, data.collate, data.left_out, data.notes)
    if "whole" in files:
        collate = TextBatch(require_tokenizer(name, backbone), options.max_tokens)
        pairs = read_csv(files["whole"], options.text, str(options.label))
        found = trim_labels([label for _, label in pairs], str(path))
        names = sorted(set(found), key=lambda y: (len(y), y))
        rows = [(text, names.index(label)) for (text, _), label in zip(pairs, found, strict=True)]
        return _known(
            rows,
            names,
            lambda n: repr(rows[n][0][:60]),
            collate,
            {},
            {"preprocessing": collate.to_dict()},
        )
    plain = path.is_dir() and not files and not (path / LISTS["train"]).exists()
    left_out: LeftOut = {}
    media = IMAGES if backbone.preprocessing is None else media_of(backbone.preprocessing)
    folders = list_classes(path, left_out, media) if plain else []
    if not plain or find_splits([each.name for each in folders], str(path)):
        return _from_data(load_data(name, backbone, options))
    if backbone.preprocessing is None:
        raise DataError("a text backbone needs text", where=name, fix="give a csv file")
    samples = []
    for each in folders:
        found, others = media.find(each)
        refuse_mixed(media, others, str(each))
        merge_left_out(left_out, others)
        samples += [(file, each.name) for file in found]
    names = sorted({label for _, label in samples})
    if not names:
        raise DataError(
            f"a folder of {media.nouns} needs a folder for each class",
            where=name,
            found=f"{len(folders)} folders, none of {media.nouns}",
            fix=f"lay it out as CLASS/{media.example}; one class is enough",
        )
    numbered = [(file, names.index(label)) for file, label in samples]
    if options.skip_bad:
        numbered, bad = drop_corrupt(numbered, backbone.preprocessing)
        left_out.setdefault(CORRUPT, []).extend(bad)
    how = describe_inputs(backbone.preprocessing)
    return _known(
        open_files(numbered, backbone.preprocessing),
        names,
        lambda n: str(numbered[n][0]),
        how.get("collate"),
        {why: [str(each) for each in files] for why, files in left_out.items()},
        how.get("notes", {}),
    )


def find_labels(split: Any) -> list[int]:
    """The labels of a split, without decoding its images where it says them otherwise."""
    return list(map(int, list_targets(split)))


def _from_data(data: Data) -> Labelled:
    if data.kind == "tags":
        raise _tags(data.name)
    return _known(
        data.train,
        list(data.labels),
        lambda n: f"example {n} of {data.name}",
        data.collate,
        data.left_out,
        data.notes,
    )


def _known(
    examples: Any,
    names: list[str],
    shown: Callable[[int], str],
    collate: Callable[[Sequence[Any]], Any] | None,
    left_out: dict[str, list[str]],
    notes: Mapping[str, Any],
) -> Labelled:
    samples = find_samples(examples)
    if samples is None:
        raise DataError(
            "these examples are not known by their contents, so nobody can tell which of them are in already",
            found=type(examples).__name__,
            fix="give a folder of images or sounds, a csv, or a list of pairs",
        )
    return Labelled(
        examples, names, find_labels(examples), samples.inputs, shown, collate, left_out, notes
    )


def _tags(where: str) -> DataError:
    return DataError(
        "tagged words are not labelled as a whole",
        where=where,
        fix="give texts with a label each, or images",
    )
