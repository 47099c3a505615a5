"""Hugging Face data sets: by name, from a folder or parquet file, or as the objects themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from restuning._errors import DataError, require
from restuning._files import expand_home
from restuning.backbones.images import read_image
from restuning.data.data import (
    SPLIT_SEED,
    Data,
    DataOptions,
    ImageDataset,
    split_by_class,
)
from restuning.data.digests import Tell, digest_value, quiet
from restuning.data.folders import MOST_CLASSES
from restuning.data.identity import (
    LABEL_COLUMNS,
    Samples,
    as_stored,
    describe_reading,
    file_inputs,
    label_digests,
)
from restuning.data.labels import trim_labels, warn_of_untrained
from restuning.data.listing import CORRUPT
from restuning.data.splits import find_splits

if TYPE_CHECKING:
    from restuning.backbones import Preprocessing

IMAGE_COLUMNS = ("image", "img")

ROWS = 1000
"""Of a table that are looked at together."""

AS_PARQUET = (
    "name one column of classes; for several columns of answers, or other kinds, write each split as a parquet file, "
    "set.to_parquet('FOLDER/train.parquet'), and give FOLDER: they are trained from one pass"
)
"""What to do where more is asked of a data set than one class an image."""

NAMED = 3
"""Rows that an error names."""


class HubImages(ImageDataset):
    """Images of a Hugging Face table, read from it and decoded when asked for.

    Args:
        table: With a column of images that it does not decode.
        column: Of the images.
        rows: Of the table, in order.
        labels: One each.
        transform: Image to tensor.
        keep: Keep transformed tensors in memory (only where the transform has no randomness).
    """

    def __init__(
        self,
        table: Any,
        column: str,
        rows: Sequence[int],
        labels: Sequence[int],
        transform: Callable[[Image.Image], Tensor],
        keep: bool = False,
    ) -> None:
        super().__init__(transform, keep)
        self.table, self.column = table, column
        self.rows, self.labels = list(rows), list(labels)
        self._known: list[bytes | Path] | None = None

    def __len__(self) -> int:
        """Number of images."""
        return len(self.rows)

    def image(self, index: int) -> Image.Image:
        """Decoded.

        Raises:
            DataError: There is none in its row, or it cannot be read.
        """
        row = self.rows[index]
        return _decode(self.table, row, self.column, f"row {row} of the data set")

    def label(self, index: int) -> int:
        """As the table has it."""
        return self.labels[index]

    @property
    def files(self) -> list[Path]:
        """One an image, where the table holds paths; empty where it holds images."""
        return [each for each in self._look_through() if isinstance(each, Path)]

    def sample_digests(self, tell: Tell = quiet) -> Samples:
        """Those of what the table holds of each image: its bytes, or its file's as they are now."""
        of_files = iter(file_inputs(self.files, tell))
        inputs = [
            next(of_files) if isinstance(each, Path) else each for each in self._look_through()
        ]
        self.forget_changed(inputs)
        return Samples(inputs, label_digests(self.labels), describe_reading(self.transform))

    def _look_through(self) -> list[bytes | Path]:
        """Of each image the digest of its bytes, or its path; read once, for a table does not change."""
        if self._known is None:
            cells = map(as_stored, self._cells())
            self._known = [cell if isinstance(cell, Path) else digest_value(cell) for cell in cells]
        return self._known

    def _cells(self) -> Iterator[Any]:
        for start in range(0, len(self.rows), ROWS):
            yield from self.table[self.rows[start : start + ROWS]][self.column]


def is_table(data: Any) -> bool:
    """Whether it is a `datasets.Dataset` or `DatasetDict`."""
    first = next(iter(data.values()), None) if isinstance(data, dict) else data
    return any(c.__module__.partition(".")[0] == "datasets" for c in type(first).__mro__)


def load_tables(name: str) -> Any:
    """A data set by its hub name; a folder of `save_to_disk`, of parquet files or of images; a file.

    Raises:
        DataError: There is none, or it cannot be read.
    """
    hf = require("datasets", "datasets", f"the data set hf:{name}")
    path = expand_home(name)
    try:
        if path.is_file():
            # By its suffix: no code of the data set's own is run, here or below.
            kind = {".parquet": "parquet", ".arrow": "arrow"}.get(path.suffix.lower())
            if kind is None:
                raise ValueError("neither a folder nor a .parquet or .arrow file")
            return hf.load_dataset(kind, data_files=str(path))
        if not path.is_dir():
            return hf.load_dataset(name)
        # What `save_to_disk` leaves, of several splits and of one.
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return hf.load_from_disk(str(path))
        return hf.load_dataset(str(path))
    # What is damaged inside of a table comes from pyarrow, whose errors are ValueErrors or these.
    except (
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        TypeError,
        hf.exceptions.DatasetsError,
    ) as error:
        raise DataError(
            "a Hugging Face data set could not be loaded",
            where=name,
            found=(str(error).splitlines() or [type(error).__name__])[0][:200],
            fix="check the name, the network or the folder",
        ) from None


def from_tables(sets: Any, name: str, preprocessing: Preprocessing, options: DataOptions) -> Data:
    """Images with a class each, of a `Dataset` or of a `DatasetDict` with a training split.

    Labels are class numbers (as `ClassLabel` or whole numbers) or words, which become classes in
    their order. Rows without an image or with a damaged one are left out with `skip_bad`.

    Raises:
        DataError: Without a training split, an image or a label column; labels that are missing, no
            classes, or several to an image.
    """
    hf = require("datasets", "datasets", f"the data set {name}")
    parts = _find_parts(sets, name)
    picture = _find_image_column(parts["train"], name)
    column = _find_label_column(parts["train"], name, options)
    kept = [_keep_encoded(hf, part, picture, column, name) for part in parts.values()]
    try:
        table = hf.concatenate_datasets([part for part, _ in kept])
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            "splits have other columns than the training split",
            where=name,
            found=str(error).splitlines()[0][:200],
            fix="cast them to the same features",
        ) from None
    labels, names = _read_labels(parts, column, name)
    bounds, start = {}, 0
    for split, (part, _) in zip(parts, kept, strict=True):
        bounds[split] = list(range(start, start + len(part)))
        start += len(part)
    left_out = _find_bad(table, picture, options.skip_bad, name)
    bad = set(left_out)
    rows = {split: [i for i in at if i not in bad] for split, at in bounds.items()}
    for split, at in rows.items():
        if not at:
            raise DataError(
                "a split without rows", where=f"{name}, split {split}", fix="leave that split out"
            )
    gone = {labels[i] for i in bounds["train"]} - {labels[i] for i in rows["train"]}
    warn_of_untrained(names, (labels[i] for i in bounds["train"]), name)
    if gone:
        raise DataError(
            "classes whose training images are all corrupt",
            where=name,
            found=", ".join(names[y] for y in sorted(gone)[:5]),
            fix="restore some, or take the classes out",
        )
    if "test" not in rows:
        # Only what is missing is drawn; a validation split that was brought stays as it is.
        shares = (0.8,) if "val" in rows else (0.7, 0.1)
        whole = rows["train"]
        drawn = [
            [whole[i] for i in d]
            for d in split_by_class([labels[i] for i in whole], shares, SPLIT_SEED)
        ]
        rows["train"], rows["test"] = drawn[0], drawn[-1]
        if "val" not in rows:
            rows["val"] = drawn[1]

    def read(at: Sequence[int], policy: str) -> HubImages:
        return HubImages(
            table,
            picture,
            at,
            [labels[i] for i in at],
            preprocessing.transform(policy),
            # An augmented image is another one each time.
            keep=policy == "none",
        )

    val = rows.get("val")
    train = [*rows["train"], *(val or [])] if options.final else rows["train"]
    return Data(
        name,
        read(train, options.augment),
        None if options.final or not val else read(val, "none"),
        read(rows["test"], "none") if rows["test"] else None,
        names,
        left_out={CORRUPT: [f"row {i}" for i in left_out]} if left_out else {},
    )


def _find_parts(sets: Any, name: str) -> dict[str, Any]:
    """The splits that are used, training first."""
    named = dict(sets) if isinstance(sets, dict) else {"train": sets}
    if not all(hasattr(part, "__len__") and part.features for part in named.values()):
        raise DataError(
            "a data set that is streamed has no rows to ask for again, and nothing tells if it is the one of before",
            where=name,
            fix="give its parquet files, of which few row groups are in memory: hf://datasets/USER/NAME/data (in "
            "quotes, with a pattern where it has several sets); or load it without streaming=True",
        )
    found = find_splits(named, name)
    if "train" not in found:
        raise DataError(
            "a data set without a train split",
            where=name,
            found=f"splits {', '.join(named)}",
            fix="rename one to train",
        )
    return {split: named[found[split]] for split in ("train", "val", "test") if split in found}


def _find_image_column(table: Any, name: str) -> str:
    chosen = next((c for c in IMAGE_COLUMNS if c in table.features), None)
    if chosen is None:
        raise DataError(
            "no image column",
            where=name,
            found=", ".join(table.features),
            fix='rename it: dataset.rename_column(..., "image")',
        )
    return chosen


def _find_label_column(table: Any, name: str, options: DataOptions) -> str:
    features = table.features
    # A name that was given and is not there is no wish for another column.
    usual = LABEL_COLUMNS if options.label == DataOptions().label else ()
    chosen = next((c for c in (str(options.label), *usual) if c in features), None)
    if chosen is None:
        raise DataError(
            "no label column",
            where=name,
            found=", ".join(features),
            fix=AS_PARQUET
            if "," in str(options.label)
            else "name it with --label, or rename it to `label`",
        )
    return chosen


def _keep_encoded(hf: Any, part: Any, picture: str, column: str, name: str) -> tuple[Any, str]:
    """A split with its images as they are stored, and nothing else."""
    if picture not in part.features or column not in part.features:
        raise DataError(
            "a split lacks a column",
            where=name,
            found=", ".join(part.features),
            fix=f"give it {picture} and {column}, as training has them",
        )
    part = part.select_columns([picture]).with_format(None)
    kind = part.features[picture]
    # Arrays and lists of numbers are images as they stand.
    if (
        type(kind).__name__ == "Image"
        or getattr(kind, "dtype", None) in ("binary", "string")
        or isinstance(kind, dict)
    ):
        try:
            part = part.cast_column(picture, hf.Image(decode=False))
        except (ValueError, TypeError, KeyError, NotImplementedError) as error:
            raise DataError(
                "a column holds no images",
                where=f"{name}, column {picture}",
                found=str(error).splitlines()[0][:200],
                fix="store images, their bytes or their paths",
            ) from None
    return part, picture


def _read_labels(parts: Mapping[str, Any], column: str, name: str) -> tuple[list[int], list[str]]:
    """A class number for every row of all splits, and the names of the classes.

    Raises:
        DataError: Labels are missing, several to an image, or no classes.
    """
    known = getattr(parts["train"].features[column], "names", None)
    values: list[Any] = []
    for split, part in parts.items():
        theirs = getattr(part.features[column], "names", None)
        if theirs != known:
            raise DataError(
                "splits have other classes than the training split",
                where=f"{name}, split {split}",
                found=f"{str(theirs)[:80]}, training {str(known)[:80]}",
                fix="give all splits the same ClassLabel",
            )
        cells = list(part.with_format(None)[column])
        _check_labels(cells, f"{name}, split {split}, column {column}")
        values += cells
    if any(isinstance(v, str) for v in values):
        trimmed = trim_labels([str(v) for v in values], f"{name}, column {column}")
        names = sorted(set(trimmed), key=lambda y: (len(y), y))
        trained = {str(v).strip() for v in parts["train"].with_format(None)[column]}
        if unknown := set(names) - trained:
            raise DataError(
                "classes that training does not have",
                where=name,
                found=", ".join(sorted(unknown)[:5]),
                fix="correct the label column",
            )
        places = {y: i for i, y in enumerate(names)}
        return [places[y] for y in trimmed], names
    labels = [int(v) for v in values]
    highest = max(labels)
    if highest >= MOST_CLASSES:
        raise DataError(
            "a label is too large to be a class number",
            where=f"{name}, column {column}",
            found=str(highest),
            fix="number classes from 0",
        )
    names = list(map(str, known)) if known else [str(i) for i in range(highest + 1)]
    # Hub data sets mark the labels of a hidden test split with -1.
    wrong = [y for y in labels if not 0 <= y < len(names)]
    if wrong:
        raise DataError(
            "labels outside the classes",
            where=f"{name}, column {column}",
            found=f"{len(wrong)} such as {wrong[0]} (an unlabelled split?)",
            fix="leave that split out",
        )
    if len(names) < 2:
        raise DataError(
            "a classification needs two classes",
            where=f"{name}, column {column}",
            found=f"{len(names)}",
            fix="check the label column",
        )
    return labels, names


def _check_labels(cells: Sequence[Any], where: str) -> None:
    """Refuse what is no class of an image."""

    def is_missing(cell: Any) -> bool:
        if isinstance(cell, str):
            return not cell.strip()
        return cell is None or (isinstance(cell, float) and math.isnan(cell))

    missing = [i for i, cell in enumerate(cells) if is_missing(cell)]
    if missing:
        raise DataError(
            "an image has no label",
            where=where,
            found=f"{len(missing)} rows such as {', '.join(map(str, missing[:NAMED]))}",
            fix="give them one, or leave them out: dataset.filter(...)",
        )
    several = next((c for c in cells if isinstance(c, (list, tuple, dict, np.ndarray))), None)
    if several is not None:
        raise DataError(
            "an image has several labels",
            where=where,
            found=str(several)[:60],
            fix="give one class an image: a task answers with one",
        )
    other = next((c for c in cells if not isinstance(c, (int, float, str))), None)
    if other is not None:
        raise DataError(
            "labels are neither numbers nor words",
            where=where,
            found=f"{type(other).__name__}, {str(other)[:60]}",
            fix="give class numbers from 0, or words",
        )
    part = next((c for c in cells if isinstance(c, float) and not c.is_integer()), None)
    if part is not None:
        raise DataError(
            "labels are fractions, not classes",
            where=where,
            found=f"{part:g}",
            fix="give class numbers from 0, or words",
        )


def _find_bad(table: Any, picture: str, skip_bad: bool, name: str) -> list[int]:
    """Rows without an image, and with `skip_bad` also those whose image is damaged.

    Raises:
        DataError: There are such rows, and they are not to be left out.
    """
    bad: list[int] = []
    if skip_bad:
        for row in range(len(table)):
            try:
                _decode(table, row, picture, f"row {row}")
            except DataError:
                bad.append(row)
        return bad
    start = 0
    for batch in table.with_format("arrow").iter(ROWS):
        # Tells without reading them.
        nothing = batch.column(picture).is_null().to_pylist()
        bad += [start + i for i, null in enumerate(nothing) if null]
        start += len(nothing)
    if bad:
        raise DataError(
            "an image is missing",
            where=f"{name}, column {picture}",
            found=f"{len(bad)} rows such as {', '.join(map(str, bad[:NAMED]))}",
            fix="leave such rows out with --skip-bad",
        )
    return bad


def _decode(table: Any, row: int, column: str, where: str) -> Image.Image:
    """A cell of a column of images."""
    cell = table[row][column]
    if isinstance(cell, dict) and cell.keys() >= {"bytes", "path"}:
        if cell["bytes"] is not None:
            return read_image(cell["bytes"], where)
        if cell["path"]:
            return read_image(Path(cell["path"]))
        cell = None
    if cell is None:
        raise DataError(
            "an image is missing", where=where, fix="leave such rows out with --skip-bad"
        )
    if isinstance(cell, list):
        # As lists, numbers no longer say how many bits they have; columns of arrays do.
        cell = np.asarray(cell, getattr(table.features[column], "dtype", None))
    return read_image(cell, where)
