"""Which of several names is the training split, which validation, which test."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from restuning._errors import DataError

SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
"""What data sets of the field call each split, in any case."""


def find_splits(names: Iterable[str], where: str, suffixes: Sequence[str] = ()) -> dict[str, str]:
    """The names that mean a split, by "train", "val" and "test"; others are passed over.

    Args:
        names: Of folders, files or splits.
        where: Of what, for the error.
        suffixes: Of files, in small letters; only names that end in one of them mean a split.

    Raises:
        DataError: Two names mean the same split.
    """
    found: dict[str, str] = {}
    for name in sorted(names):
        ends = [e for e in suffixes if name.lower().endswith(e)] if suffixes else [""]
        words = {name.lower().removesuffix(end) for end in ends}
        split = next((s for s, known in SPLIT_NAMES.items() if words & set(known)), None)
        if split is None:
            continue
        if split in found:
            raise DataError(
                f"two names for the {split} split",
                where=where,
                found=f"{found[split]} and {name}",
                fix="leave one of them",
            )
        found[split] = name
    return found
