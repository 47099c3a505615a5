"""Images and sounds on disk: class folders and the VTAB-1K list layout."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from restuning._errors import DataError, FormatError, warn
from restuning._files import lies_inside, read_json
from restuning.data.data import (
    SPLIT_SEED,
    Data,
    DataOptions,
    ImageFiles,
    name_of,
    split_by_class,
)
from restuning.data.labels import warn_of_look_alikes, warn_of_untrained
from restuning.data.listing import (
    BACK,
    BESIDE,
    CORRUPT,
    NEEDS_EXTRA,
    OURS,
    LeftOut,
    is_folder,
    is_ours,
    list_above,
    list_entries,
    locate,
    merge_left_out,
    why_left_out,
)
from restuning.data.media import (
    IMAGES,
    Media,
    describe_inputs,
    drop_corrupt,
    media_of,
    open_files,
    refuse_mixed,
)
from restuning.data.sounds import Sounds
from restuning.data.splits import SPLIT_NAMES, find_splits
from restuning.data.text_files import read_text, split_lines

if TYPE_CHECKING:
    from restuning.backbones.inputs import AnyPreprocessing

_SPLIT = "|".join([*(name for names in SPLIT_NAMES.values() for name in names), "eval"])
_LIKE_SPLIT = re.compile(rf"({_SPLIT})([\W_\d].*)?$", re.IGNORECASE)
"""Names that begin with that of a split: `train2`, `test_images`, `val-set`."""

_ENDS_LIKE_SPLIT = re.compile(rf".*[\W_]({_SPLIT})$", re.IGNORECASE)
"""Names that end with one: `seg_train`; of a class alone it may be one of trains."""

_LIKE_RUNS = ("runs", "checkpoints", "outputs", "logs", "wandb", "mlruns", "lightning_logs")
"""Names of folders that training tools leave beside data."""

LABEL_DIGITS = 9
"""A label with more is a damaged line, not a class."""

MOST_CLASSES = 1_000_000
"""Beyond, one damaged label would ask for as many names."""

LISTS = {"train": "train800.txt", "val": "val200.txt", "test": "test.txt"}
"""Files of the VTAB-1K layout, by split."""

Samples = dict[str, list[tuple[Path, int]]]
"""Path and label of each input, by split."""


def from_folder(path: Path, preprocessing: AnyPreprocessing, options: DataOptions) -> Data:
    """A folder in either layout; see `load_data`."""
    media = media_of(preprocessing)
    listed = (path / LISTS["train"]).exists()
    left_out: LeftOut = {}
    splits, labels = (
        _read_vtab_lists(path) if listed else _find_class_folders(path, media, left_out)
    )
    if options.skip_bad:
        before = {labels[y] for _, y in splits["train"]}
        for key, samples in splits.items():
            splits[key], bad = drop_corrupt(samples, preprocessing)
            left_out.setdefault(CORRUPT, []).extend(bad)
            if bad and not splits[key]:
                raise DataError(
                    f"a split whose {media.nouns} are all corrupt",
                    where=f"{path}, {key}",
                    found=f"{len(bad)} {media.nouns} such as {_name(bad[0], path)}",
                    fix="restore some, or take them out",
                )
        gone = sorted(before - {labels[y] for _, y in splits["train"]})
        if gone:
            raise DataError(
                f"classes whose training {media.nouns} are all corrupt",
                where=str(path),
                found=", ".join(gone[:5]),
                fix="restore some, or take the classes out",
            )
    train = splits["train"] + (splits.get("val", []) if options.final else [])

    def part(key: str) -> ImageFiles | Sounds | None:
        return open_files(splits[key], preprocessing) if splits.get(key) else None

    return Data(
        name_of(path),
        open_files(train, preprocessing, options.augment),
        None if options.final else part("val"),
        part("test"),
        labels,
        left_out={why: [_name(p, path) for p in paths] for why, paths in left_out.items()},
        **describe_inputs(preprocessing),
    )


def _name(file: Path, folder: Path) -> str:
    return os.path.relpath(file, folder)


def _find_class_folders(path: Path, media: Media, left_out: LeftOut) -> tuple[Samples, list[str]]:
    """Samples of every split, and the names of the classes; `left_out` takes what is passed over."""
    folders = list_classes(path, left_out, media)
    splits = find_splits([p.name for p in folders], str(path))
    # Folders of images alone, beside others, are classes: `bus`, `car` and `train`.
    inside = {key: list_classes(path / name, {}, media) for key, name in splits.items()}
    classes_too = len(folders) > len(splits) and not any(inside.values())
    if splits and not classes_too:
        return _find_in_splits(path, splits, folders, media, left_out)
    samples, labels = _list_files(path, folders, media, left_out)
    _warn_of_names(path, labels)
    # One folder a class and no parts: they are drawn once, the same for everybody.
    drawn = split_by_class([y for _, y in samples], (0.7, 0.1), SPLIT_SEED)
    return {
        key: [samples[i] for i in part]
        for key, part in zip(("train", "val", "test"), drawn, strict=True)
    }, labels


def _find_in_splits(
    path: Path, splits: dict[str, str], folders: list[Path], media: Media, left_out: LeftOut
) -> tuple[Samples, list[str]]:
    others = [p for p in folders if p.name not in splits.values()]
    # What could be a split and is neither validation nor test by its name is asked about.
    unclear = [p.name for p in others if p.name.lower() in ("eval", "evaluation", "holdout")]
    if unclear:
        raise DataError(
            "a folder that may be the validation or the test split",
            where=str(path),
            found=", ".join(unclear),
            fix="call it val or test",
        )
    if "train" not in splits:
        raise DataError(
            "a folder with val or test but no train",
            where=str(path),
            found=", ".join(splits.values()),
            fix="add train/CLASS/...",
        )
    if others:
        left_out.setdefault(BESIDE, []).extend(others)
    base = path / splits["train"]
    samples: Samples = {}
    samples["train"], labels = _list_files(
        base, list_classes(base, left_out, media), media, left_out
    )
    warn_of_look_alikes(labels, str(base))
    for key in ("val", "test"):
        if key not in splits:
            continue
        own = path / splits[key]
        folders = list_classes(own, left_out, media)
        extra = {p.name for p in folders} - set(labels)
        if extra:
            raise DataError(
                "classes that training does not have",
                where=str(own),
                found=", ".join(sorted(extra)[:5]),
                fix=f"give them training {media.nouns}",
            )
        samples[key], _ = _list_files(own, folders, media, left_out, labels)
    return samples, labels


def list_classes(path: Path, left_out: LeftOut, media: Media = IMAGES) -> list[Path]:
    """Folders of a folder that may be classes: not what earlier runs left, nor a way back."""
    folders, above = [], list_above(path) | {locate(path)}
    for name, entry in sorted(list_entries(path).items()):
        each = path / name
        if not is_folder(entry):
            if entry.is_symlink() and not each.exists():
                raise DataError(
                    "a link to what is gone",
                    where=str(each),
                    found=os.readlink(each),
                    fix="restore it, or take the link out",
                )
            loose = each.suffix.lower() in media.suffixes()
            why = why_left_out(each) if media is IMAGES else media.other
            left_out.setdefault(media.loose if loose else why, []).append(each)
        elif is_ours(list_entries(each)):
            left_out.setdefault(OURS, []).append(each)
        elif entry.is_symlink() and locate(each) in above:
            left_out.setdefault(BACK, []).append(each)
        else:
            folders.append(each)
    return folders


def _list_files(
    path: Path,
    folders: list[Path],
    media: Media,
    left_out: LeftOut,
    labels: list[str] | None = None,
) -> tuple[list[tuple[Path, int]], list[str]]:
    """Images or sounds of class folders, and the classes; a folder of nothing but earlier runs is none."""
    found: dict[str, list[Path]] = {}
    for folder in folders:
        files, others = media.find(folder)
        refuse_mixed(media, others, str(folder))
        merge_left_out(left_out, others)
        if files or not others.get(OURS):
            found[folder.name] = files
    labels = sorted(found) if labels is None else labels
    if len(labels) < 2:
        raise DataError(
            f"a folder of {media.nouns} needs a folder for each class",
            where=str(path),
            found=f"{len(labels)} folders",
            fix=f"lay it out as CLASS/{media.example}, optionally below train/, val/ and test/",
        )
    empty = [name for name, files in found.items() if not files]
    _warn_of_splits_inside(path, folders, found)
    if empty or not found:
        raise DataError(
            f"class folders without {media.nouns}",
            where=str(path),
            found=", ".join(empty[:5]) or "none",
            fix=f"put {media.nouns} there ({media.usual}), or remove the folders"
            + _say_extra(left_out.get(NEEDS_EXTRA, [])),
        )
    places = {name: y for y, name in enumerate(labels)}
    return [(file, places[name]) for name, files in found.items() for file in files], labels


def _warn_of_splits_inside(path: Path, folders: list[Path], images: dict[str, list[Path]]) -> None:
    """Of classes that hold the splits in place of splits that hold the classes."""
    for folder in folders:
        inside = {
            parts[0].lower()
            for image in images.get(folder.name, [])
            if len(parts := image.relative_to(folder).parts) > 1
        }
        meant = [s for s, known in SPLIT_NAMES.items() if inside & set(known)]
        if "train" in meant and len(meant) > 1:
            warn(
                "splits inside of a class are read as one",
                where=str(path / folder.name),
                found=", ".join(sorted(inside)[:5]),
                fix="put the classes into the splits: train/CLASS/image.jpg, test/CLASS/image.jpg",
            )
            return


def _say_extra(files: list[Path]) -> str:
    return f"; for {files[0].name}: pip install 'restuning[heif]'" if files else ""


def _warn_of_names(path: Path, names: list[str]) -> None:
    """Classes by whose names something else is meant, most likely."""
    like_splits = [n for n in names if _LIKE_SPLIT.match(n)]
    ends = [(n, found[1].lower()) for n in names if (found := _ENDS_LIKE_SPLIT.match(n))]
    if len({split for _, split in ends}) > 1:
        like_splits += [n for n, _ in ends if n not in like_splits]
    warn_of_look_alikes(names, str(path))
    if like_splits:
        warn(
            "classes that look like splits",
            where=str(path),
            found=", ".join(like_splits[:5]),
            fix="call the splits train, val and test if they are meant; classes go inside of them",
        )
    like_runs = [n for n in names if n.lower() in _LIKE_RUNS]
    if like_runs:
        warn(
            "classes that look like folders of runs",
            where=str(path),
            found=", ".join(like_runs[:5]),
            fix="take them out of the data, if they are no classes",
        )


def read_list(file: Path) -> list[tuple[Path, int]]:
    """Lines of `images/xxx.jpg label`.

    Raises:
        DataError: A line is malformed or names a file outside of the list's folder, or the list is
            missing or no text.
    """
    samples = []
    homes: dict[Path, bool] = {}
    for number, line in enumerate(split_lines(read_text(file)), 1):
        if not line.strip():
            continue
        # From the right: file names may hold spaces.
        name, _, label = line.strip().rpartition(" ")
        if not name or not label.isascii() or not label.isdigit() or len(label) > LABEL_DIGITS:
            raise DataError(
                "a line of a list is malformed",
                where=f"{file}, line {number}",
                found=line[:80],
                fix="write `images/xxx.jpg label` with a label from 0",
            )
        samples.append((_require_inside(file, name.strip(), number, homes), int(label)))
    return samples


def _require_inside(file: Path, name: str, line: int, homes: dict[Path, bool]) -> Path:
    """A file that a list names, which must lie in the list's folder, links followed.

    A list comes with a data set from somewhere else, and a path in it is its author's and not the
    user's. In folders of classes nobody names a path; a link there is the user's own, and followed.

    Args:
        file: The list.
        name: A path in it.
        line: Where.
        homes: What is known of folders by lines before.

    Raises:
        DataError: It lies elsewhere.
    """
    path, top = file.parent / name, file.parent
    try:
        leaves = not path.is_relative_to(top) or ".." in path.relative_to(top).parts
        if not leaves and path.parent not in homes:
            homes[path.parent] = lies_inside(path.parent, top)
        leaves = leaves or not homes[path.parent]
        if not leaves and path.is_symlink():
            leaves = not lies_inside(path, top)
    except (OSError, ValueError):
        # A name that no file can have.
        leaves = True
    if leaves:
        raise DataError(
            "a list names a file outside of its folder",
            where=f"{file}, line {line}",
            found=name[:200],
            fix="put the images below the list's folder, or lay them out as class folders, where "
            "links are followed; the whole folder may be a link",
        )
    return path


def _read_vtab_lists(path: Path) -> tuple[dict[str, list[tuple[Path, int]]], list[str]]:
    splits = {k: read_list(path / v) for k, v in LISTS.items() if (path / v).exists()}
    for key, samples in splits.items():
        if not samples:
            raise DataError(
                "an empty list of images",
                where=str(path / LISTS[key]),
                fix="write lines of `images/xxx.jpg label`, or remove the file",
            )
    highest = max((y for s in splits.values() for _, y in s), default=-1)
    if highest >= MOST_CLASSES:
        raise DataError(
            "a label is too large to be a class number",
            where=str(path),
            found=str(highest),
            fix="correct the lists",
        )
    # Lists hold numbers; names are in a file beside them, where somebody wrote one.
    described = path / "task.json"
    labels = [str(i) for i in range(highest + 1)]
    if described.exists():
        try:
            classes = read_json(described)["classes"]
            # A word is a sequence too, of its letters.
            if not isinstance(classes, list) or not all(isinstance(c, str | int) for c in classes):
                raise TypeError(f"classes is {classes!r:.60}")
            labels = list(map(str, classes))
        except (FormatError, KeyError, TypeError) as error:
            raise DataError(
                "task.json of a data set is malformed",
                where=str(described),
                found=getattr(error, "found", "") or str(error),
                fix='it needs "classes", a list of names',
            ) from None
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise DataError(
            "a classification needs two classes, each of another name",
            where=str(path),
            found=f"{len(labels)} classes, {len(set(labels))} names",
            fix="correct the labels of the lists, or the names in task.json",
        )
    if highest >= len(labels) or highest < 0:
        raise DataError(
            "labels and classes do not fit",
            where=str(path),
            found=f"highest label {highest}, {len(labels)} classes",
            fix="correct the lists",
        )
    seen = (y for key in ("train", "val") for _, y in splits.get(key, []))
    warn_of_untrained(labels, seen, str(path))
    return splits, labels
