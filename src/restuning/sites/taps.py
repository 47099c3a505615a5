"""What a task reads of a backbone, and the features that answer it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor

from restuning._errors import MissingInputError

Tokens = Literal["cls", "last", "all", "pool"]

IN_WORDS: dict[str, str] = {
    "cls": "class token",
    "last": "last token",
    "all": "all tokens",
    "pool": "pooled",
}

FEATURE = "feature"
"""Among taps, `feature/mean` is the frozen readout of the last stream with that pooling, `b 1 D`."""

ONE_TOKEN = ("cls", "last")
"""Parts that are one token as it is. Where a store holds all tokens of some taps, it holds these of others."""

PARTS: dict[str, str] = {
    "patches": "mean, largest values and deviation of patches",
    "tokens": "mean, largest values and deviation of tokens",
    "places": "means along rows and columns",
    **{token: IN_WORDS[token] for token in ONE_TOKEN},
}
"""What may be read of a tap in place of its tokens, as `block.3/patches`, `b k d`: a few numbers a
channel that are small to store. Tokens are normalised first (no parameters), but for `ONE_TOKEN`."""


def split_tap(name: str) -> tuple[str, str]:
    """The tap and the part that a name stands for, as of `block.3/patches`; a whole tap has no part."""
    tap, _, part = name.partition("/")
    return tap, part


def is_stream(name: str) -> bool:
    """Whether a name stands for tokens of a tap, and not for a part of it or for the feature."""
    return "/" not in name


def count_taps(names: Sequence[str]) -> str:
    """How many taps are kept, in words: `13 taps`, `13 taps and 15 parts of them`, `1 part of taps`,
    `6 taps, one token of 7 more and 15 parts of them`.
    """
    whole = sum(map(is_stream, names))
    single = sum(split_tap(n)[1] in ONE_TOKEN and split_tap(n)[0] != FEATURE for n in names)
    parts = len(names) - whole - single
    taps = f"{whole} tap{'' if whole == 1 else 's'}"
    taps += f"{',' if parts else ' and'} one token of {single} more" if single else ""
    if not parts:
        return taps
    more = f"{parts} part{'' if parts == 1 else 's'} of"
    return f"{taps} and {more} them" if whole else f"{more} taps"


@dataclass(frozen=True, slots=True)
class Needs:
    """What a task reads of the backbone: which taps, and which tokens of them.

    Attributes:
        taps: `block.0` ... `block.L`, parts of them (`PARTS`) as
            `block.3/patches`, or the frozen feature as `feature/mean`.
        tokens: Of whole taps: "cls" (the class token only), "last" (the last real token only), "all", or "pool":
            one vector a tap, the mean over its tokens, and for the last tap the backbone's own
            feature.
        pool_patches: With "all", patches are read as means of squares of this many by this many.
            A store keeps them so, but for the last tap, which the readout takes whole; a forward
            gives all.
    """

    taps: tuple[str, ...]
    tokens: Tokens = "all"
    pool_patches: int = 1

    @property
    def form(self) -> str:
        """The tokens as users write them: `cls`, `all`, `all/2`."""
        return self.tokens if self.pool_patches == 1 else f"{self.tokens}/{self.pool_patches}"


def resolve_tokens(pool: str | None) -> Tokens:
    """What a readout reads of the last stream: one token, the backbone's own vector, or all."""
    of: dict[str | None, Tokens] = {"cls": "cls", "last": "last", "own": "pool"}
    return of.get(pool, "all")


def covers_tokens(
    stored: str, needed: str, stored_patches: int = 1, needed_patches: int = 1
) -> bool:
    """Whether tokens that are stored hold those that are needed: all hold the first and the last.

    What is pooled is in no other: the last of it is the backbone's own feature. Where patches were
    pooled, the class token is still there as it was; whole patches can be pooled at any time.
    """
    if stored_patches not in (1, needed_patches):
        return needed == "cls"
    return stored == needed or (stored == "all" and needed in ("cls", "last"))


def unite_needs(several: Sequence[Needs], taps: Sequence[str]) -> Needs:
    """What one forward keeps for several tasks, each thing once, in an order that is not that of `several`.

    Where some read all tokens of a tap, it is kept whole, and of taps of which others read one token, that
    is a part (`block.3/cls`). Needs that all read the same tokens stay as they are.

    Args:
        several: Of the tasks; either all of them read pooled vectors or none.
        taps: Of the backbone, in order.
    """

    def names(needs: Needs) -> list[str]:
        return [taps[-1] if name == "last" else name for name in needs.taps]

    # What reads nothing but parts can be kept beside any tokens.
    kinds: set[Tokens] = {n.tokens for n in several if any(map(is_stream, n.taps))}
    kinds = kinds or {several[0].tokens}
    tokens = "all" if "all" in kinds else min(kinds)
    sides = {n.pool_patches for n in several if n.tokens == "all"}
    # Whole patches can be pooled at any time, and pooled ones in one way only.
    side = sides.pop() if len(sides) == 1 else 1
    whole = {name for n in several if n.tokens == tokens for name in names(n)}
    found = set()
    for needs in several:
        has = covers_tokens(tokens, needs.tokens, side, needs.pool_patches)
        for name in names(needs):
            apart = is_stream(name) and needs.tokens != tokens and not (has and name in whole)
            found.add(f"{name}/{needs.tokens}" if apart else name)

    def order(name: str) -> tuple[bool, int, str]:
        tap, part = split_tap(name)
        return not is_stream(name), taps.index(tap) if tap in taps else len(taps), part

    return Needs(tuple(sorted(found, key=order)), tokens, side)


class Features(dict[str, Tensor]):
    """Taps of one forward by name, with the frozen readout on loan.

    Attributes:
        readout: Final norm and pooling, `(state, pool, mask) -> feature`.
        mask: Which tokens are real, `b n`; None where all are.
        time: Time steps of a diffusion model, `b` or `1`; None where there are none.
    """

    def __init__(
        self,
        taps: Mapping[str, Tensor],
        readout: Callable[..., Tensor],
        mask: Tensor | None = None,
        time: Tensor | None = None,
    ) -> None:
        super().__init__(taps)
        self.readout, self.mask, self.time = readout, mask, time

    def select(self, rows: Callable[[Tensor], Tensor]) -> Features:
        """The features of some inputs of the batch.

        Args:
            rows: Takes their rows of a tensor.
        """
        mask = None if self.mask is None else rows(self.mask)
        time = self.time
        # One step may stand for the whole batch.
        time = time if time is None or time.numel() == 1 else rows(time)
        return Features({n: rows(t) for n, t in self.items()}, self.readout, mask, time)


def resolve_readout(taps: Mapping[str, Tensor], given: Callable[..., Tensor] | None) -> Any:
    """The readout that was given, else the one that came with the features, with their mask.

    Raises:
        MissingInputError: Neither.
    """
    if isinstance(taps, Features):
        # Padding must not enter a mean, whoever's readout it is.
        readout = taps.readout if given is None else given
        return readout if taps.mask is None else partial(readout, mask=taps.mask)
    if given is not None:
        return given
    raise MissingInputError(
        "a task needs the backbone's readout",
        found="plain taps without one",
        fix="pass host.features(...) itself, or give host.readout as the second argument",
    )
