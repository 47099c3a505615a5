"""Labels that are words, as people write them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from restuning._errors import warn


def trim_labels(labels: Sequence[str], where: str) -> list[str]:
    """Labels without blanks around them; a warning where two become one by that.

    Args:
        labels: Of all splits together.
        where: Of what, for the warning.
    """
    spelt: dict[str, set[str]] = {}
    for label in labels:
        spelt.setdefault(label.strip(), set()).add(label)
    joined = [name for name, ways in spelt.items() if len(ways) > 1]
    if joined:
        ways = ", ".join(map(repr, sorted(spelt[joined[0]])))
        warn(
            "labels that differ in blanks around them are taken for one class",
            where=where,
            found=f"{len(joined)} such as {ways}",
            fix="rename one of them if two classes are meant",
        )
    trimmed = [label.strip() for label in labels]
    warn_of_look_alikes(set(trimmed), where)
    return trimmed


def warn_of_look_alikes(names: Iterable[str], where: str) -> None:
    """Of classes that differ in case, blanks, letters that are not seen or how accents are written."""
    alike: dict[str, list[str]] = {}
    for name in sorted(names):
        seen = re.sub("[\u00ad\u200b\u2060\ufeff]", "", unicodedata.normalize("NFKC", name))
        alike.setdefault(" ".join(seen.split()).casefold(), []).append(name)
    several = [ways for ways in alike.values() if len(ways) > 1]
    if several:
        warn(
            "labels that look alike are classes of their own",
            where=where,
            found=f"{len(several)} such as {' and '.join(map(ascii, several[0]))}",
            fix="write them in one way if one class is meant",
        )


def warn_of_untrained(names: Sequence[str], trained: Iterable[int], where: str) -> None:
    """Of classes that have a place among the answers and not one training example."""
    known = set(trained)
    without = [name for y, name in enumerate(names) if y not in known]
    if without:
        warn(
            "classes without a training example",
            where=where,
            found=f"{len(without)} of {len(names)}, such as {', '.join(without[:3])}",
            fix="number classes from 0 without gaps, or give examples of them",
        )


def warn_of_unjudged(names: Sequence[str], there: Mapping[str, set[int]], where: str) -> None:
    """Of classes that are trained and that no example of another split has, which figures of that split say nothing of.

    Args:
        names: Of all classes.
        there: By "train", "val" and "test", as far as there are: the classes that an example has.
        where: Of what.
    """
    missing = {
        split: [names[y] for y in sorted(there["train"] - found)]
        for split, found in there.items()
        if split != "train"
    }
    told = [f"{split}: {', '.join(own[:3])}" for split, own in missing.items() if own]
    if told:
        warn(
            "classes that a split has no example of: its figures say nothing of them",
            where=where,
            found="; ".join(told),
            fix="give more examples of them, or make the splits by hand: train/, val/ and test/",
        )
