"""What a data set is known by: its contents, example by example and in order.

Two data sets of one identity give the same features and the same training, wherever their files lie
and whatever they are called.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from restuning._errors import DataError
from restuning.data.digests import Tell, digest_files, digest_value, quiet
from restuning.runtime.randomness import preserve_randomness, seed_everything

READ = 2000
"""Examples that are read of a data set of a kind that is not known here; of more, so many evenly spaced."""

PROBED, DRAWS = 8, 3
"""Examples that are read again, and how often, to see whether they follow from torch's, NumPy's and
Python's generators alone. Also those that tell how a list of files is read."""

INPUTS = ("samples", "data", "_samples", "_image_files")
LABELS = ("targets", "labels", "_labels")
"""Names by which data sets, torchvision's among them, keep something of every example at hand."""

LABEL_COLUMNS = ("label", "labels", "fine_label", "coarse_label")
"""Of Hugging Face tables, the first that is there: CIFAR-100 brings both, and the fine ones are reported on it."""

HELD = (list, tuple, TensorDataset)
"""Kinds of data sets that hold what they give: nothing is drawn."""

ROWS = 1000
"""Of a table that are read at once."""

DIGITS = 32
"""Hexadecimal digits of a digest that is written down."""


@dataclass(frozen=True)
class Contents:
    """What is known of a data set.

    Attributes:
        inputs: Digest of its inputs in their order, before anything random happens to them.
        labels: Digest of its labels.
        reading: Digest of how inputs are read (transform, augmentation); "" where it is not known.
        assumed: In words, what was taken for granted; "" where everything was read.
    """

    inputs: str
    labels: str
    reading: str = ""
    assumed: str = ""

    def key(self) -> dict[str, str]:
        """What features of it depend on, beside the preprocessing."""
        return {"inputs": self.inputs, "labels": self.labels}


@dataclass(frozen=True)
class Samples:
    """Digests of every example, in order.

    Attributes:
        inputs, labels: One each.
        reading: As of `Contents`.
    """

    inputs: Sequence[bytes]
    labels: Sequence[bytes]
    reading: str = ""

    def pick(self, indices: Iterable[int]) -> Samples:
        """Those of some examples."""
        at = [int(i) for i in indices]
        return Samples([self.inputs[i] for i in at], [self.labels[i] for i in at], self.reading)

    def contents(self) -> Contents:
        """Of all of them."""
        return Contents(combine(self.inputs), combine(self.labels), self.reading)


def combine(parts: Iterable[bytes | str]) -> str:
    """One digest of many, in their order."""
    digest = hashlib.sha256()
    count = 0
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
        count += 1
    digest.update(count.to_bytes(8, "little"))
    return digest.hexdigest()[:DIGITS]


def digest_names(names: Sequence[str]) -> str:
    """Of the names of classes, in their order."""
    return combine(digest_value(str(name)) for name in names)


def describe_reading(*parts: Any) -> str:
    """Digest of how inputs are made of what is stored: a transform, a collate function's options."""
    return combine(map(digest_value, parts))


def file_samples(
    samples: Sequence[tuple[Path, int]], reading: str = "", tell: Tell = quiet
) -> Samples:
    """Digests of image files and their labels."""
    inputs = file_inputs([path for path, _ in samples], tell)
    return Samples(inputs, label_digests(y for _, y in samples), reading)


def file_inputs(files: Sequence[Path], tell: Tell = quiet) -> list[bytes]:
    """Digests of image files. One that is missing has none of its own: reading it fails."""
    digests = digest_files(files, tell)
    return [b"missing".ljust(32) if d is None else bytes.fromhex(d) for d in digests]


def label_digests(labels: Iterable[Any]) -> list[bytes]:
    """Of labels one by one; a number is the same whatever it is kept in."""
    known: dict[int, bytes] = {}
    digests = []
    for label in labels:
        if isinstance(label, (Tensor, np.ndarray, np.generic)):
            # Of a mask its bytes: a list of so many numbers takes long to make.
            label = label.tolist() if label.ndim < 2 else label
        if type(label) is not int:
            digests.append(digest_value(label))
        else:
            # As many as classes: each is made once.
            digests.append(known.get(label) or known.setdefault(label, digest_value(label)))
    return digests


def identify(dataset: Any, tell: Tell = quiet) -> Contents:
    """What a map-style data set is known by.

    A data set may say itself what it is: by an attribute `identity`, a text that is another one
    whenever its contents are. Files are known by their bytes, lists, tensors and Hugging Face tables
    whole. Anything else is read: all of it up to `READ` examples, so many evenly spaced of more, each
    with the generators of torch, NumPy and Python seeded for it, so that augmentation draws what it
    drew before. Where an example is another one all the same, labels alone are compared.

    Args:
        dataset: Of `(input, label)`, or of anything that is collated to it.
        tell: Receives a line where much has to be read.

    Cost: of files and lists a pass over their bytes (files that did not change are not read again);
        of others reading up to `READ` examples. Generators are left as they were.
    """
    contents = getattr(dataset, "contents", None)
    if isinstance(contents, Contents):
        return contents
    named = getattr(dataset, "identity", None)
    if isinstance(named, str) and named:
        return Contents(combine([named]), "")
    samples = find_samples(dataset, tell)
    return _read(dataset, tell) if samples is None else samples.contents()


def find_samples(dataset: Any, tell: Tell = quiet) -> Samples | None:
    """Digests example by example, of data sets that are known whole; None of others."""
    digests = getattr(dataset, "sample_digests", None)
    if callable(digests):
        samples = digests(tell)
        return samples if isinstance(samples, Samples) else None
    if isinstance(dataset, Subset):
        whole = find_samples(dataset.dataset, tell)
        return None if whole is None else whole.pick(dataset.indices)
    if isinstance(dataset, ConcatDataset):
        parts = [find_samples(part, tell) for part in dataset.datasets]
        known = [part for part in parts if part is not None]
        return concatenate(known) if len(known) == len(parts) else None
    if type(dataset) in HELD:
        return _draw(dataset, range(len(dataset)))
    return None


def list_files(dataset: Any) -> list[Path] | None:
    """The files that a data set gives one example each of; None of others."""
    return _list_each(dataset, "files")


def list_ids(dataset: Any) -> list[str] | None:
    """What a data set itself calls its examples, where that is no file of each (`shard/KEY` in tars); None of others."""
    return _list_each(dataset, "ids")


def _list_each(dataset: Any, attribute: str) -> list[Any] | None:
    if isinstance(dataset, Subset):
        whole = _list_each(dataset.dataset, attribute)
        return None if whole is None else [whole[int(i)] for i in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [_list_each(part, attribute) for part in dataset.datasets]
        known = [part for part in parts if part is not None]
        return [each for part in known for each in part] if len(known) == len(parts) else None
    each = getattr(dataset, attribute, None)
    return list(each) if isinstance(each, (list, tuple)) and len(each) == len(dataset) else None


def is_decoded(dataset: Any) -> bool:
    """Whether examples are made of files each time they are asked for, also of files in tars."""
    if isinstance(dataset, ConcatDataset):
        return all(map(is_decoded, dataset.datasets))
    if callable(getattr(dataset, "fetch", None)) or list_files(dataset) is not None:
        return True
    # Of views, subsets and splits without targets.
    inner = getattr(dataset, "dataset", None) or getattr(dataset, "split", None)
    return inner is not None and is_decoded(inner)


def _list_checks(dataset: Any) -> list[Callable[..., object]]:
    """What compares data that lie in a few large files with what they were."""
    if isinstance(dataset, ConcatDataset):
        return [check for part in dataset.datasets for check in _list_checks(part)]
    if isinstance(dataset, Subset):
        # Of other rows than the whole has: all is compared.
        return [lambda start, stop, own=own: own() for own in _list_checks(dataset.dataset)]
    check = getattr(dataset, "check_unchanged", None)
    if callable(check):
        return [check]
    inner = getattr(dataset, "split", None)
    return [] if inner is None else _list_checks(inner)


class Watch:
    """Tells whether the files of a data set are still what they were when this was made.

    Make it before `identify`, and check it after reading: what was read is then what is identified.

    Args:
        dataset: Any; of one that has no files nothing is watched.
    """

    def __init__(self, dataset: Any) -> None:
        self.files = list_files(dataset) or []
        self.before = digest_files(self.files)
        self.checks = _list_checks(dataset)

    def check(self, start: int = 0, stop: int | None = None) -> None:
        """Compare the files of some examples, or of all.

        Raises:
            DataError: One has other contents now; it is named.

        Cost: a `stat` a file.
        """
        for check in self.checks:
            check(start, stop)
        now = digest_files(self.files[start:stop])
        for file, old, new in zip(
            self.files[start:stop], self.before[start:stop], now, strict=True
        ):
            if old != new:
                raise DataError(
                    "the data changed while they were read",
                    where=str(file),
                    found="other contents than at the start",
                    fix="let nothing write to them, and run the same command again: what was read of "
                    "them since is not kept",
                )


def concatenate(parts: Sequence[Samples]) -> Samples:
    """Those of several data sets, one after the other."""
    readings = list(dict.fromkeys(part.reading for part in parts))
    return Samples(
        [each for part in parts for each in part.inputs],
        [each for part in parts for each in part.labels],
        readings[0] if len(readings) == 1 else combine(readings),
    )


# Data sets of other kinds.


def _read(dataset: Any, tell: Tell) -> Contents:
    count = len(dataset)
    table = _read_table(dataset, tell)
    inputs, labels, whole = table or _read_attributes(dataset, tell)
    # Where all is known, a few examples tell how it is read.
    at = _spaced(count, PROBED if whole else READ)
    if len(at) > PROBED:
        tell(f"reading {len(at):,} of {count:,} examples, to know them by their contents")
    drawn, assumed = _draw(dataset, at), []
    if _is_random(dataset):
        drawn = Samples([], drawn.labels)
        assumed.append("inputs are others each time they are read, and were not compared")
    if whole:
        return Contents(
            combine(inputs), combine([*labels, *drawn.labels]), combine(drawn.inputs), *assumed
        )
    if len(at) < count:
        assumed.append(f"{len(at):,} of {count:,} examples were read, evenly spaced")
    return Contents(
        combine([*inputs, *drawn.inputs, str(count)]),
        combine([*labels, *drawn.labels]),
        assumed="; ".join(assumed),
    )


def _spaced(count: int, most: int) -> list[int]:
    most = min(count, most)
    return [number * count // most for number in range(most)]


def _draw(dataset: Any, at: Sequence[int]) -> Samples:
    """Digests of examples, each drawn under seeds that follow from its number."""
    inputs, labels = [], []
    held = type(dataset) in HELD
    with preserve_randomness():
        for index in at:
            if not held:
                seed_everything("identity", index, devices=False)
            example = dataset[index]
            # What is no pair is input.
            pair = isinstance(example, (tuple, list)) and len(example) == 2
            x, y = example if pair else (example, None)
            inputs.append(digest_value(x))
            labels += label_digests([y])
    return Samples(inputs, labels)


def _is_random(dataset: Any) -> bool:
    """Whether examples are others under the same seeds: their generators are their own."""
    at = _spaced(len(dataset), PROBED)
    first = _draw(dataset, at).inputs
    return any(_draw(dataset, at).inputs != first for _ in range(1, DRAWS))


_Known = tuple[list[bytes], list[bytes], bool]
"""Digests of inputs and of labels, and whether they are all there is to know of the inputs."""


def _read_table(dataset: Any, tell: Tell) -> _Known | None:
    """The columns of a Hugging Face data set, as they are stored."""
    if type(dataset).__module__.partition(".")[0] != "datasets":
        return None
    inputs: list[bytes] = []
    labels: list[bytes] = []
    if len(dataset) > READ:
        tell(f"reading {len(dataset):,} rows, to know them by their contents")
    rows = dataset.with_format("arrow")
    for start in range(0, len(dataset), ROWS):
        table = rows[start : start + ROWS]
        for name in table.column_names:
            cells = [as_stored(value) for value in table.column(name).to_pylist()]
            column = labels if name in LABEL_COLUMNS else inputs
            column.append(digest_value([name, cells]))
    return inputs, labels, True


def as_stored(value: Any) -> Any:
    """An image that is kept as a path is its file's contents, one that is kept as bytes those."""
    if isinstance(value, dict) and value.keys() >= {"bytes", "path"}:
        return value["bytes"] if value["bytes"] is not None else Path(value["path"] or "")
    return value


def _read_attributes(dataset: Any, tell: Tell) -> _Known:
    """What a data set keeps of every example: arrays, labels, or paths, whose files are read."""
    attributes: Mapping[str, Any] = getattr(dataset, "__dict__", {})

    def find(names: Sequence[str]) -> list[Any]:
        values = [attributes[name] for name in names if name in attributes]
        kinds = (list, tuple, Tensor, np.ndarray)
        return [v for v in values if isinstance(v, kinds) and len(v) == len(dataset)]

    inputs = []
    for value in find(INPUTS):
        if isinstance(value, (list, tuple)):
            paths = [Path(p) for each in value if (p := _path(each)) is not None]
            if len(paths) == len(value) and paths:
                inputs.append(combine(file_inputs(paths, tell)).encode())
                continue
        inputs.append(digest_value(value))
    labels = [digest_value(value) for value in find(LABELS)]
    # Of other classes it is not known that they have nothing else.
    known = type(dataset).__module__.startswith("torchvision.datasets")
    return inputs, labels, known and bool(inputs)


def _path(sample: Any) -> Any:
    """The path in front of a sample, where it is that of a file."""
    first = sample[0] if isinstance(sample, (list, tuple)) and sample else sample
    return first if isinstance(first, (str, Path)) and Path(first).is_file() else None
